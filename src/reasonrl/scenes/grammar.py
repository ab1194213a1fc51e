"""What a prompt of the drawn world asks for, and how such a prompt is written.

    prompt  = clause {("," | "and" | ", and") clause}
    clause  = object | object ["is"] relation object
            | relation object "is" object          first clause only: inverted
            | relation object                      after a relating clause: its subject again
    object  = ["a" | "an" | "the" | number] [texture] [colour] shape

A relation binds the two objects it stands between: "a circle above a square and a cross" says
nothing about the cross, "a circle above a square and below a cross" relates the circle twice.
A colour or texture that is not named is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

from attrs import evolve, field, frozen

from reasonrl.errors import DataError
from reasonrl.relations import PHRASES, Relation
from reasonrl.scenes.world import COLORS, MOST_OBJECTS, SHAPES, TEXTURES, check_word

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")
"""As T2I-CompBench names them."""
ARTICLES = ("a", "an", "the")
NUMBERS = ("one", "two", "three", "four")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
RELATIONS = tuple(relation for relation in Relation if relation is not Relation.INSIDE)
"""Those this world can draw: its objects never contain each other."""
SPOKEN: Mapping[Relation, tuple[str, ...]] = {
    Relation.LEFT: ("left of", "on the left of", "to the left of"),
    Relation.RIGHT: ("right of", "on the right of", "to the right of"),
    Relation.ABOVE: ("above", "on top of", "on the top of"),
    Relation.BELOW: ("below", "under", "underneath", "beneath", "on the bottom of"),
    Relation.NEXT_TO: ("next to", "near", "beside", "on the side of", "by the side of"),
}
"""The phrases our own prompts use; `parse_prompt` reads all of `plan.PHRASES`."""


@frozen
class Wanted:
    """A kind of object and how many of it; None is free."""

    shape: str = field()
    color: str | None = None
    texture: str | None = None
    count: int = 1

    def __attrs_post_init__(self) -> None:
        check_word(self.shape, SHAPES, "shape")
        if self.color is not None:
            check_word(self.color, COLORS, "colour")
        if self.texture is not None:
            check_word(self.texture, TEXTURES, "texture")
        if not 1 <= self.count <= MOST_OBJECTS:
            raise DataError(f"count must be in 1..{MOST_OBJECTS}, got {self.count}")

    @property
    def name(self) -> str:
        """Its words in the singular, without article."""
        return " ".join(word for word in (self.texture, self.color, self.shape) if word)


Link = tuple[int, Relation, int]
"""(i, relation, j): wanted i stands in this relation to wanted j."""


@frozen
class Request:
    """What a prompt asks for: kinds of objects, relations between single ones, a category."""

    wanted: tuple[Wanted, ...]
    relations: tuple[Link, ...] = ()
    category: str = field()

    @category.default
    def _from_content(self) -> str:
        return category_of(self.wanted, self.relations)

    @category.validator
    def _check_category(self, _: object, value: str) -> None:
        check_word(value, CATEGORIES, "category")

    def __attrs_post_init__(self) -> None:
        num_objects = len(self.instances)
        if not 1 <= num_objects <= MOST_OBJECTS:
            raise DataError(f"a prompt asks for 1 to {MOST_OBJECTS} objects, got {num_objects}")
        for i, relation, j in self.relations:
            if i == j or not {i, j} <= set(range(len(self.wanted))):
                raise DataError(f"relation ({i}, {relation}, {j}) must link two of the objects")
            if relation not in RELATIONS:
                raise DataError(f"the drawn world has no relation {relation.value!r}")
            many = [w.name for w in (self.wanted[i], self.wanted[j]) if w.count > 1]
            if many:
                raise DataError(f"a relation links single objects, got several of {many[0]!r}")

    @property
    def instances(self) -> tuple[int, ...]:
        """The index in `wanted` of each object asked for: (0, 0, 0, 1) for three and one."""
        return tuple(i for i, wanted in enumerate(self.wanted) for _ in range(wanted.count))


def category_of(wanted: Sequence[Wanted], relations: Sequence[Link]) -> str:
    """Returns the category: the kind of binding that is asked for, "complex" for several kinds."""
    color, texture = any(w.color for w in wanted), any(w.texture for w in wanted)
    if any(w.count > 1 for w in wanted):
        return "complex" if relations else "numeracy"
    if relations:
        return "complex" if texture or len(wanted) > 2 else "spatial"
    if color and texture:
        return "complex"
    return "color" if color else "texture" if texture else "shape"


def write_prompt(
    request: Request,
    *,
    phrases: Mapping[Relation, str] | None = None,
    verb: str = "",
    inverted: bool = False,
) -> str:
    """Returns a prompt that `parse_prompt` reads back as this request.

    `phrases` words the relations (default: their own values), `verb` ("is") stands before them,
    `inverted` puts the first relation in front: "above a square is a circle". Raises DataError
    where the objects are not in the order in which a prompt mentions them.
    """
    phrases = phrases or {relation: relation.value for relation in RELATIONS}
    words = [_spoken(w, request.category) for w in request.wanted]
    links = list(request.relations)
    text, subject, mentioned = "", None, 0
    while mentioned < len(words):
        here, last = words[mentioned], mentioned == len(words) - 1
        if text and links and links[0][::2] == (subject, mentioned):
            text += f" and {verb} {phrases[links.pop(0)[1]]} {here}"
            mentioned += 1
            continue
        # With relations, ", and" keeps "above a square" from reaching over to the next object.
        text += "" if not text else ", and " if request.relations else " and " if last else ", "
        if links and links[0][::2] == (mentioned, mentioned + 1):
            phrase, there = phrases[links.pop(0)[1]], words[mentioned + 1]
            turned = inverted and mentioned == 0
            text += f"{phrase} {there} is {here}" if turned else f"{here} {verb} {phrase} {there}"
            subject, mentioned = mentioned, mentioned + 2
        else:
            text += here
            subject, mentioned = None, mentioned + 1
    if links:
        raise DataError(f"no prompt says relation {links[0]}: put objects in order of mention")
    return " ".join(text.split())


def _spoken(wanted: Wanted, category: str) -> str:
    *attributes, shape = wanted.name.split()
    if category == "numeracy":
        number = NUMBERS[wanted.count - 1]
        return " ".join([number, *attributes, shape if wanted.count == 1 else PLURALS[shape]])
    return f"{'an' if wanted.name[0] in 'aeiou' else 'a'} {wanted.name}"


def parse_prompt(text: str) -> Request:
    """Returns what a prompt asks for; raises DataError, in one line, for what it cannot read.

    Case, spaces and a final full stop do not matter.

    >>> parse_prompt("To the left of a blue square is a red circle.").relations
    ((0, <Relation.LEFT: 'left of'>, 1),)
    """
    return _Reader(text).request()


_SHAPE_OF = {word: s for s, plural in PLURALS.items() for word in (s, plural)}
_COUNT_OF = {**dict.fromkeys(ARTICLES, 1), **{word: i for i, word in enumerate(NUMBERS, start=1)}}
_OBJECT_WORDS = {*_SHAPE_OF, *_COUNT_OF, *COLORS, *TEXTURES}
_KNOWN = sorted({*_OBJECT_WORDS, "and", "is", ",", *(w for p in PHRASES for w in p.split())})
_TOKEN = re.compile(rf"(?:{'|'.join(sorted(map(re.escape, PHRASES), key=len, reverse=True))})(?![\w-])|[\w-]+|\S")


class _Reader:
    """Reads a prompt from left to right; `next` is the word to read, "" at the end."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        self.words = _TOKEN.findall(self.text.lower().removesuffix("."))
        self.wanted: list[Wanted] = []
        self.links: list[Link] = []
        self.counted = False
        self._check_words()

    def _check_words(self) -> None:
        unknown = dict.fromkeys(w for w in self.words if w not in _KNOWN and w not in PHRASES)
        if unknown or not self.words:
            near = [get_close_matches(word, _KNOWN, n=1) for word in unknown]
            hints = [
                f"{word!r} (did you mean {found[0]!r}?)" if found else repr(word)
                for word, found in zip(unknown, near, strict=True)
            ]
            what = f"has unknown words: {', '.join(hints)}" if unknown else "is empty"
            raise DataError(f"prompt {self.text!r} {what}; the drawn world knows {_EXAMPLE}")

    @property
    def next(self) -> str:
        return self.words[0] if self.words else ""

    def request(self) -> Request:
        subject = self.inverted() if self.next in PHRASES else self.clause(None)
        while self.words:
            if self.next not in (",", "and"):
                self.refuse('"," or "and" between objects')
            if self.words.pop(0) == "," and self.next == "and":
                self.words.pop(0)
            subject = self.clause(subject)
        return self.checked()

    def checked(self) -> Request:
        try:
            request = Request(tuple(self.wanted), tuple(self.links))
            if self.counted and not self.links:
                request = evolve(request, category="numeracy")
        except DataError as error:
            raise DataError(f"prompt {self.text!r}: {error}") from error
        return request

    def clause(self, subject: int | None) -> int | None:
        """Reads one clause; returns the object that a clause without subject would be about."""
        if not self.relates():
            subject = self.object()
            if not self.relates():
                return None
        elif subject is None:
            self.refuse("an object before the relation")
        if self.next == "is":
            self.words.pop(0)
        relation = PHRASES[self.words.pop(0)]
        assert subject is not None
        self.links.append((subject, relation, self.object()))
        return subject

    def inverted(self) -> int:
        relation = PHRASES[self.words.pop(0)]
        place = self.one()
        if self.next != "is":
            self.refuse('"is" and the object that is there')
        self.words.pop(0)
        self.wanted += [self.one(), place]
        self.links.append((0, relation, 1))
        return 0

    def relates(self) -> bool:
        return self.next in PHRASES or (self.next == "is" and [*self.words, ""][1] in PHRASES)

    def object(self) -> int:
        self.wanted.append(self.one())
        return len(self.wanted) - 1

    def one(self) -> Wanted:
        """Reads article or number, attributes in any order, and the shape."""
        count, color, texture = 1, None, None
        if self.next in _COUNT_OF:
            self.counted |= self.next in NUMBERS
            count = _COUNT_OF[self.words.pop(0)]
        while self.next in COLORS or self.next in TEXTURES:
            word = self.next
            if (color if word in COLORS else texture) is not None:
                self.refuse("one colour and one texture an object")
            color, texture = (word, texture) if word in COLORS else (color, word)
            self.words.pop(0)
        if self.next not in _SHAPE_OF:
            self.refuse(f"a shape ({', '.join(SHAPES)})")
        shape = _SHAPE_OF[self.next]
        if self.next != (shape if count == 1 else PLURALS[shape]):
            self.refuse(repr(shape if count == 1 else PLURALS[shape]))
        self.words.pop(0)
        return Wanted(shape, color, texture, count)

    def refuse(self, expected: str) -> NoReturn:
        found = f"{self.next!r}" if self.next else "the end"
        raise DataError(f"prompt {self.text!r}: expected {expected}, found {found}")


_EXAMPLE = "prompts like 'a red circle on the left of a striped square'"
