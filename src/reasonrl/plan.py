"""The Generation Chain-of-Thought of GoT-R1 as a value: free prose with named boxes.

Wire form: `<|obj_start|>teal vase<|obj_end|> <|box_start|>(625,361),(992,887)<|box_end|>`, integers
in 0..1000 of the canvas, origin top left, x before y.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import SupportsIndex, final

from attrs import Factory, define, evolve, field, frozen

from reasonrl.errors import DataError

OBJ_START, OBJ_END = "<|obj_start|>", "<|obj_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
CANVAS = 1000
"""The side of the canvas in a box's units."""
MIN_SIDE = 10
"""A box with a shorter side is degenerate: 1% of the canvas."""
MAX_OBJECTS = 32
MAX_REPORTS = 32
"""Sentences in `Plan.skipped`; a last one counts what is left out."""

_MARKER = re.compile(r"(<\|(?:obj|box)_(?:start|end)\|>)")
_WIRE_BOX = re.compile(r"\s*{0}\s*,\s*{0}\s*".format(r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"))
_NUMBER = re.compile(r"(?:(?<![0-9.])-)?[0-9]*\.?[0-9]+")
_COORDINATES = re.compile(r"[\s0-9().,:;（），．-]*")
_GLUES = re.compile(r"[\w<|>]")  # two words, or the halves of a marker that has one inside it
_SENTENCE_END = re.compile(r"[.!?。！？]")
_LONGEST_BOX = 200  # characters; four numbers with any spacing fit


def _whole(value: SupportsIndex) -> int:
    try:
        return index(value)
    except TypeError:
        raise DataError(f"a Box holds whole numbers in 0..{CANVAS}, got {value!r}: round it") from None


@final
@frozen
class Box:
    """A rectangle of the canvas: whole numbers in 0..1000, x to the right, y down.

    Bad order and bad range construct, so that they can be reported (`Plan.problems`); a number
    that is not whole raises DataError.
    """

    x0: int = field(converter=_whole)
    y0: int = field(converter=_whole)
    x1: int = field(converter=_whole)
    y1: int = field(converter=_whole)

    @property
    def width(self) -> float:
        """x1 − x0, and 0 for reversed corners."""
        return float(max(0, self.x1 - self.x0))

    @property
    def height(self) -> float:
        """y1 − y0, and 0 for reversed corners."""
        return float(max(0, self.y1 - self.y0))

    @property
    def area(self) -> float:
        """Width × height, at most 1e6."""
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def overlap(self, other: Box) -> float:
        """Returns the area that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return float(max(0, width) * max(0, height))

    def iou(self, other: Box) -> float:
        """Returns intersection over union in [0, 1]; 1 only for equal boxes, 0 for empty ones."""
        both = self.overlap(other)
        either = self.area + other.area - both
        return both / either if either > 0 else 0.0

    def problems(self) -> tuple[str, ...]:
        """Returns what is wrong with it, a clause each; empty for a box the parser keeps as is."""
        found = []
        if not all(0 <= side <= CANVAS for side in (self.x0, self.y0, self.x1, self.y1)):
            found.append(f"leaves the canvas 0..{CANVAS}")
        if self.x0 > self.x1 or self.y0 > self.y1:
            found.append("has reversed corners, expected top left, bottom right")
        elif min(self.width, self.height) < MIN_SIDE:
            found.append(f"has a side under {MIN_SIDE}")
        return tuple(found)

    def __str__(self) -> str:
        return f"({self.x0},{self.y0}),({self.x1},{self.y1})"


@final
@frozen
class PlannedObject:
    """A name and where it goes; `box` is None where the plan gives no usable box."""

    name: str
    box: Box | None


@final
@frozen
class Plan:
    """A chain of thought as written, with the objects read from it."""

    text: str
    objects: tuple[PlannedObject, ...]
    """At most 32, in the order written."""
    skipped: tuple[str, ...] = ()
    """What the parser skipped or repaired, one sentence each."""

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Returns the plan in any text; never raises, takes linear time, and reports all repairs.

        White space around names and numbers is nobody's fault and not reported. A box belongs to
        the last named object up to the end of its sentence; several boxes make several objects of
        that name. Numbers are rounded and clamped, reversed corners swapped. A box that is never
        closed, has a side under 10 or not four numbers is dropped; an object left with none has
        `box=None`.
        """
        reader = _Reader()
        reader.read(text)
        return cls(text, tuple(reader.objects), tuple(reader.reports()))

    @classmethod
    def of(cls, objects: Iterable[PlannedObject], *, prose: str = "") -> Plan:
        """Returns the plan that says `prose` and then lists the objects.

        Raises DataError, in one line with every offender, for what `parse` would not read back.
        """
        listed = tuple(evolve(each, name=_one_line(each.name)) for each in objects)
        problems = [problem for each in listed for problem in _object_problems(each)]
        if len(listed) > MAX_OBJECTS:
            problems.append(f"{len(listed)} objects, expected at most {MAX_OBJECTS}")
        if _MARKER.search(prose):
            problems.append(f"the prose {_shown(prose)} contains a marker, expected plain text")
        if problems:
            raise DataError("; ".join(problems))
        return cls(" ".join([*[prose] * bool(prose), *map(print_object, listed)]), listed)

    @property
    def ok(self) -> bool:
        """Well formed: something is planned, and nothing was skipped or repaired."""
        return bool(self.objects) and not self.skipped

    @property
    def prose(self) -> str:
        """The text without boxes and markers, names kept, in one line: what R_sem's judge reads."""
        said = [""]
        first, *rest = _MARKER.split(self.text)
        for marker, body, following in [("", first, ""), *_steps(rest)]:
            if marker == BOX_START:
                body = "" if following == BOX_END else _COORDINATES.sub("", body, count=1)
                while said[-1].isspace():
                    said.pop()
                said[-1] = said[-1].rstrip()
            if _GLUES.match(said[-1][-1:]) and _GLUES.match(body):
                said.append(" ")
            if body:
                said.append(body)
        return _one_line("".join(said))

    def problems(self) -> tuple[str, ...]:
        """Returns what is wrong with the layout, one sentence each (of the text: `skipped`).

        Says: no objects, no box, off the canvas, reversed corners, a side under 10, a name twice.
        """
        if not self.objects:
            return ("the plan names no objects, expected at least one",)
        found = [problem for each in self.objects for problem in _object_problems(each)]
        times = Counter(plain_name(each.name) for each in self.objects)
        return (
            *found,
            *(f"{_shown(name)} is planned {n} times" for name, n in times.items() if n > 1),
        )

    def __str__(self) -> str:
        return self.text


def print_object(planned: PlannedObject) -> str:
    """Returns the wire form of one object, without a box where it has none.

    Raises DataError for a name that is empty or contains a marker: it could forge other objects.
    """
    name = _one_line(planned.name)
    if problem := _name_problem(name):
        raise DataError(problem)
    box = f" {BOX_START}{planned.box}{BOX_END}" if planned.box else ""
    return f"{OBJ_START}{name}{OBJ_END}{box}"


def _name_problem(name: str) -> str | None:
    if not name.strip():
        return f"object name {_shown(name)} is empty, expected a word"
    if marker := _MARKER.search(name):
        return f"object name {_shown(name)} contains the marker {marker[0]}, expected plain words"
    return None


def _object_problems(planned: PlannedObject) -> Iterator[str]:
    if problem := _name_problem(planned.name):
        yield problem
    if planned.box is None:
        yield f"{_shown(planned.name)} has no box"
    else:
        for clause in planned.box.problems():
            yield f"{_shown(planned.name)}: box {planned.box} {clause}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _steps(rest: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (marker, the text behind it, the next marker or "")."""
    return zip(rest[::2], rest[1::2], [*rest[2::2], ""], strict=False)


@define
class _Reader:
    """Reads a text once, from left to right; `name` is the object that a box would belong to."""

    objects: list[PlannedObject] = Factory(list)
    skipped: list[str] = Factory(list)
    num_left_out: int = 0
    name: str | None = None
    num_boxes: int = 0
    """Boxes opened for `name`, readable or not."""
    num_read: int = 0
    words: str = ""
    """The first words between `name` and its next box."""

    def read(self, text: str) -> None:
        _, *rest = _MARKER.split(text)
        before = ""
        for marker, body, following in _steps(rest):
            if marker == OBJ_START:
                self.open_name(body, closed=following == OBJ_END)
            elif marker == BOX_START:
                self.open_box(body, closed=following == BOX_END)
            else:
                if before != (OBJ_START if marker == OBJ_END else BOX_START):
                    self.skipped.append(f"A {marker} closes nothing.")
                self.pass_words(body)
            before = marker
        self.finish()

    def open_name(self, body: str, *, closed: bool) -> None:
        self.finish()
        name = _one_line(body)
        if not closed:
            self.skipped.append(f"The name {_shown(name)} was never closed and is skipped.")
        elif not name:
            self.skipped.append("An object without a name is skipped.")
        else:
            self.name = name

    def pass_words(self, text: str) -> None:
        if self.name is not None and _SENTENCE_END.search(text):
            self.finish()
        self.words = self.words or text.strip()

    def open_box(self, body: str, *, closed: bool) -> None:
        if self.name is None:
            self.skipped.append(f"The box {_shown(body)} belongs to no object and is skipped.")
            return
        if self.words and not self.num_boxes:
            self.report(f"words stand between the name and its box: {_shown(self.words)}")
        self.num_boxes, self.words = self.num_boxes + 1, ""
        if closed:
            box, repairs = _read_box(body)
            if repairs:
                self.report(f"the box {_shown(body)} {', '.join(repairs)}")
            if box:
                self.num_read += 1
                self.add(PlannedObject(self.name, box))
        else:
            self.report(f"the box {_shown(body)} was never closed and is skipped")
            self.pass_words(_COORDINATES.sub("", body, count=1))

    def finish(self) -> None:
        """Ends the object that is open."""
        if self.name is not None:
            if not self.num_read:
                self.add(PlannedObject(self.name, None))
            if not self.num_boxes:
                self.report("no box follows it")
            if self.num_boxes > 1:
                self.report(f"{self.num_boxes} boxes, {self.num_read} read as an object each")
        self.name, self.num_boxes, self.num_read, self.words = None, 0, 0, ""

    def add(self, planned: PlannedObject) -> None:
        if len(self.objects) < MAX_OBJECTS:
            self.objects.append(planned)
        else:
            self.num_left_out += 1

    def report(self, clause: str) -> None:
        self.skipped.append(f"{_shown(self.name or '')}: {clause}.")

    def reports(self) -> Iterator[str]:
        yield from self.skipped[:MAX_REPORTS]
        if (more := len(self.skipped) - MAX_REPORTS) > 0:
            yield f"And {more} more were skipped or repaired."
        if self.num_left_out:
            yield f"{self.num_left_out} objects after the first {MAX_OBJECTS} are skipped."


def _read_box(body: str) -> tuple[Box | None, list[str]]:
    """Returns the box, None where there is none to keep, and the repairs it took, a clause each."""
    if len(body) > _LONGEST_BOX:
        return None, [f"of {len(body)} characters is skipped"]
    clean = _WIRE_BOX.fullmatch(body)
    plain = unicodedata.normalize("NFKC", body).replace("\N{MINUS SIGN}", "-")
    numbers = clean.groups() if clean else _NUMBER.findall(plain)
    if len(numbers) != 4:
        return None, [f"has {len(numbers)} numbers, expected 4, and is skipped"]
    repairs = [] if clean else ["is not written (x0,y0),(x1,y1)"]
    exact = [float(number) for number in numbers]
    clamped = [min(max(number, 0), CANVAS) for number in exact]
    if clamped != exact:
        repairs.append("is clamped to the canvas")
    xs, ys = ([round(clamped[axis]), round(clamped[axis + 2])] for axis in (0, 1))
    if sorted(xs) != xs or sorted(ys) != ys:
        repairs.append("has reversed corners, now swapped")
    box = Box(min(xs), min(ys), max(xs), max(ys))
    if min(box.width, box.height) < MIN_SIDE:
        return None, [*repairs, f"has a side under {MIN_SIDE} and is skipped"]
    return box, repairs


def plain_name(name: str) -> str:
    """Returns the name to match by: lower case, single spaces, no leading article."""
    first, *rest = name.lower().split() or [""]
    return " ".join(rest if rest and first in ("a", "an", "the") else [first, *rest])
