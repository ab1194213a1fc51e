"""Whether an image, or a plan, is what a prompt asked for: a list of atoms that hold or do not.

All fractions are in [0, 1]; 1 = everything asked for and nothing else, and nothing at all earns 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attrs import frozen

from reasonrl.plan import Box, PlannedObject
from reasonrl.relations import holds
from reasonrl.scenes.grammar import ARTICLES, Link, Request, Wanted
from reasonrl.scenes.world import COLORS, SHAPES, SOLID, TEXTURES

MOST_CANDIDATES = 8
"""Objects tried for one thing asked for; identical further ones are extra anyway."""
MOST_OVERLAP = 0.1
"""IoU from which two planned boxes are not apart."""


class Visible(Protocol):
    """An object with attributes: drawn, detected or named in a plan; None is not said."""

    @property
    def shape(self) -> str | None: ...  # noqa: D102
    @property
    def color(self) -> str | None: ...  # noqa: D102
    @property
    def texture(self) -> str | None: ...  # noqa: D102
    @property
    def box(self) -> Box | None: ...  # noqa: D102


class Seen(Protocol):
    """What `parser` and `detector` return."""

    @property
    def objects(self) -> Sequence[Visible]: ...  # noqa: D102
    @property
    def num_stray(self) -> int: ...  # noqa: D102


@frozen
class Named:
    """An object of a plan; all attributes None where the name means nothing in this world."""

    shape: str | None
    color: str | None
    texture: str | None
    box: Box | None


@frozen
class Atoms:
    """What holds, under the assignment of objects to wishes that makes the most hold."""

    present: tuple[bool, ...]
    """For each object asked for, in the order of `Request.instances`."""
    counts: tuple[bool, ...]
    """For each kind of object, where the prompt asks for several of one: exactly so many."""
    relations: tuple[bool, ...]
    nothing_extra: bool
    """Something is there, and nothing that was not asked for."""

    @property
    def all(self) -> tuple[bool, ...]:
        """Every atom, in this order."""
        return (*self.present, *self.counts, *self.relations, self.nothing_extra)


def objects_of_plan(planned: Sequence[PlannedObject]) -> list[Named]:
    """Returns planned objects with the attributes that their names say.

    "a striped red circle" has all three; "red circle" is solid; "red dog" has none and is extra.
    """
    return [_read_name(item) for item in planned]


def _read_name(item: PlannedObject) -> Named:
    words = item.name.lower().split()
    words = words[1:] if words[:1] and words[0] in ARTICLES else words
    said: dict[str, str] = {}
    for word in words:
        kinds = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES}
        kind = next((k for k, known in kinds.items() if word in known), None)
        if kind is None or kind in said:
            return Named(None, None, None, item.box)
        said[kind] = word
    if "shape" not in said or words[-1] != said["shape"]:
        return Named(None, None, None, item.box)
    return Named(said["shape"], said.get("color"), said.get("texture", SOLID), item.box)


def atoms(request: Request, objects: Sequence[Visible], *, num_stray: int = 0) -> Atoms:
    """Returns which atoms of a request hold for these objects."""
    places = request.instances
    chosen = _assign(request, objects)
    used = {k for k in chosen if k is not None}
    links = _single_links(request)
    return Atoms(
        present=tuple(k is not None for k in chosen),
        counts=_counts(request, chosen, objects) if len(places) > len(request.wanted) else (),
        relations=tuple(_holds(link, chosen, objects) for link in links),
        nothing_extra=bool(used) and len(used) == len(objects) and not num_stray,
    )


def exact(request: Request, reading: Seen) -> bool:
    """Returns whether the image shows exactly what was asked for."""
    return all(atoms(request, reading.objects, num_stray=reading.num_stray).all)


def fraction(request: Request, reading: Seen) -> float:
    """Returns the mean of all atoms of an image."""
    return _mean(atoms(request, reading.objects, num_stray=reading.num_stray).all)


def named_fraction(request: Request, objects: Sequence[Visible]) -> float:
    """Returns the mean of the atoms that need no boxes: objects, counts, nothing extra."""
    found = atoms(Request(request.wanted, (), request.category), objects)
    return _mean((*found.present, *found.counts, found.nothing_extra))


def layout_fraction(request: Request, objects: Sequence[Visible]) -> float:
    """Returns the mean of the relations; without any, of the asked objects with a box of their own.

    A box is its own if it overlaps every other by IoU under 0.1. A relation to something missing
    does not hold.
    """
    found = atoms(request, objects)
    if found.relations:
        return _mean(found.relations)
    alone = [_is_alone(k, objects) for k in _assign(request, objects)]
    return _mean(alone)


def _is_alone(chosen: int | None, objects: Sequence[Visible]) -> bool:
    box = None if chosen is None else objects[chosen].box
    others = [item.box for k, item in enumerate(objects) if k != chosen and item.box is not None]
    return box is not None and all(box.iou(other) < MOST_OVERLAP for other in others)


def matches(wanted: Wanted, item: Visible) -> bool:
    """Returns whether an object is of the kind asked for."""
    return item.shape == wanted.shape and all(
        asked is None or asked == given for asked, given in ((wanted.color, item.color), (wanted.texture, item.texture))
    )


def _counts(request: Request, chosen: Sequence[int | None], objects: Sequence[Visible]) -> tuple[bool, ...]:
    used = {k for k in chosen if k is not None}
    spare = [item for k, item in enumerate(objects) if k not in used]
    found = [i for i, k in zip(request.instances, chosen, strict=True) if k is not None]
    return tuple(
        found.count(i) == wanted.count and not any(matches(wanted, item) for item in spare)
        for i, wanted in enumerate(request.wanted)
    )


def _single_links(request: Request) -> list[Link]:
    """Returns the relations between positions in `Request.instances` (related kinds are single)."""
    at = request.instances.index
    return [(at(i), relation, at(j)) for i, relation, j in request.relations]


def _holds(link: Link, chosen: Sequence[int | None], objects: Sequence[Visible]) -> bool:
    i, relation, j = link
    a, b = (None if k is None else objects[k].box for k in (chosen[i], chosen[j]))
    return a is not None and b is not None and holds(relation, a, b)


def _assign(request: Request, objects: Sequence[Visible]) -> tuple[int | None, ...]:
    """Returns an object, or None, for each instance: one to one, most present and related.

    Depth first with a bound, so that the usual case, everything in order, is one descent.
    """
    kinds = [request.wanted[i] for i in request.instances]
    links = _single_links(request)
    options = [[k for k, item in enumerate(objects) if matches(kind, item)][:MOST_CANDIDATES] for kind in kinds]
    best: tuple[int, tuple[int | None, ...]] = (-1, (None,) * len(kinds))

    def descend(chosen: tuple[int | None, ...], score: int) -> None:
        nonlocal best
        depth = len(chosen)
        open_links = sum(max(i, j) >= depth for i, _, j in links)
        if score + len(kinds) - depth + open_links <= best[0]:
            return
        if depth == len(kinds):
            best = (score, chosen)
            return
        for k in (*(k for k in options[depth] if k not in chosen), None):
            longer = (*chosen, k)
            closed = [link for link in links if max(link[0], link[2]) == depth]
            gained = (k is not None) + sum(_holds(link, longer, objects) for link in closed)
            descend(longer, score + gained)

    descend((), 0)
    return best[1]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
