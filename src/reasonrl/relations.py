"""Relations between planned boxes, and matching of planned with found objects by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import final

from reasonrl.plan import Box, PlannedObject, plain_name

MAX_OVERLAP = 0.1
"""IoU from which two boxes overlap too much to be beside each other (T2I-CompBench's UniDet)."""
MAX_GAP = 250
"""Canvas units between two boxes that are still next to each other."""
MIN_COVER = 0.95
"""Fraction of a box that must lie in another one for it to be inside."""


@final
class Relation(StrEnum):
    """Where one object is, seen from another."""

    LEFT = "left of"
    RIGHT = "right of"
    ABOVE = "above"
    BELOW = "below"
    NEXT_TO = "next to"
    INSIDE = "inside"

    @property
    def inverse(self) -> Relation | None:
        """The relation of b to a where self is that of a to b; None for INSIDE."""
        return _INVERSES.get(self)


_INVERSES = {
    Relation.LEFT: Relation.RIGHT,
    Relation.RIGHT: Relation.LEFT,
    Relation.ABOVE: Relation.BELOW,
    Relation.BELOW: Relation.ABOVE,
    Relation.NEXT_TO: Relation.NEXT_TO,
}
_LEADS = ("", "on ", "to ", "at ", "on the ", "to the ", "at the ")
_WORDS = {
    Relation.LEFT: [f"{lead}left {of}" for lead in _LEADS for of in ("of", "side of")],
    Relation.RIGHT: [f"{lead}right {of}" for lead in _LEADS for of in ("of", "side of")],
    Relation.ABOVE: ["above", *(f"{lead}top of" for lead in _LEADS)],
    Relation.BELOW: ["below", "under", "underneath", "beneath"] + [f"{lead}bottom of" for lead in _LEADS],
    Relation.NEXT_TO: ["next to", "near", "beside", "adjacent to", "close to"]
    + [f"{lead}side of" for lead in ("on ", "on the ", "by ", "by the ")],
    Relation.INSIDE: ["inside", "inside of", "within"],
}


PHRASES: Mapping[str, Relation] = MappingProxyType(
    {phrase: relation for relation, phrases in _WORDS.items() for phrase in phrases}
)
"""Lower-case phrase -> relation. Not "in" or "on": "in front of", "in a park", "on a sunny day"."""
_LONGEST_FIRST = "|".join(sorted(PHRASES, key=len, reverse=True)).replace(" ", r"\s+")
# (?a: ASCII only, else a Kelvin sign would pass for a k where case is ignored.
_PHRASE = re.compile(rf"(?<!\w)(?ai:{_LONGEST_FIRST})(?!\w)")


def find_relation(text: str) -> tuple[str, Relation, str] | None:
    """Returns (what stands left, relation, what stands right) of the first phrase in the text.

    >>> find_relation("a horse on the right of a man")
    ('a horse', <Relation.RIGHT: 'right of'>, 'a man')

    The longest phrase wins where several begin, in any case, at word bounds. None where no phrase
    has words on both sides.
    """
    for phrase in _PHRASE.finditer(text):
        left, right = text[: phrase.start()].strip(), text[phrase.end() :].strip(" \t\r\n.,;:!?")
        if left and right:
            return left, PHRASES[" ".join(phrase[0].split()).lower()], right
    return None


def holds(relation: Relation, a: Box, b: Box) -> bool:
    """Returns whether box a is so related to box b, strictly as GoT-R1's R_PI prompt asks.

    The four directions are those of T2I-CompBench's UniDet evaluator, ties kept: the centres differ
    that way at least as much as the other way, and IoU is under 0.1. Its "next to" (either centre
    distance under 150 of 480 pixels) holds for opposite edges too, so NEXT_TO here is IoU under 0.1
    and edges at most 250 of 1000 apart, on the farther axis. INSIDE is 95% of a in a larger b.
    """
    if relation is Relation.INSIDE:
        return a.overlap(b) >= MIN_COVER * a.area > 0 and a.area < b.area
    if a.iou(b) >= MAX_OVERLAP:
        return False
    if relation is Relation.NEXT_TO:
        return max(b.x0 - a.x1, a.x0 - b.x1, b.y0 - a.y1, a.y0 - b.y1) <= MAX_GAP
    dx, dy = (mine - other for mine, other in zip(a.center, b.center, strict=True))
    along, across = (dx, dy) if relation in (Relation.LEFT, Relation.RIGHT) else (dy, dx)
    negative = relation in (Relation.LEFT, Relation.ABOVE)
    return abs(along) >= abs(across) and (along < 0 if negative else along > 0)


def match(planned: Sequence[PlannedObject], found: Sequence[PlannedObject]) -> list[tuple[int, int | None, float]]:
    """Returns (index in planned, its partner's index in found, their IoU), in planned order.

    One to one, among objects of the same plain name, with the largest total IoU (exact, Hungarian).
    An object without a box has no partner; one without a partner gets (i, None, 0.0).
    """
    partners: dict[int, tuple[int, float]] = {}
    places = _boxes_by_name(found)
    for name, mine in _boxes_by_name(planned).items():
        theirs = places.get(name, [])
        gains = [[box.iou(other) for _, other in theirs] for _, box in mine]
        for row, column in _assign(gains):
            partners[mine[row][0]] = theirs[column][0], gains[row][column]
    return [(i, *partners.get(i, (None, 0.0))) for i in range(len(planned))]


def mean_iou(planned: Sequence[PlannedObject], found: Sequence[PlannedObject]) -> float:
    """Returns R_RI of GoT-R1 (section 3), in [0, 1]: the mean over planned of the matched IoU.

    Without planned boxes it is 0, never 1: else the policy learns to leave boxes out.
    """
    return sum(iou for _, _, iou in match(planned, found)) / max(1, len(planned))


def _boxes_by_name(objects: Sequence[PlannedObject]) -> dict[str, list[tuple[int, Box]]]:
    groups = defaultdict(list)
    for i, each in enumerate(objects):
        if each.box is not None:
            groups[plain_name(each.name)].append((i, each.box))
    return groups


def _assign(gains: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Returns the (row, column) pairs of largest total gain, min(rows, columns) of them.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987), O(rows² columns).
    """
    if not gains or not gains[0]:
        return []
    if len(gains) > len(gains[0]):
        return [(row, column) for column, row in _assign(list(zip(*gains, strict=True)))]
    num_columns = len(gains[0])
    row_price, column_price = [0.0] * len(gains), [0.0] * (num_columns + 1)
    owner = [-1] * (num_columns + 1)  # row of each column, -1 is free; the last holds the root
    for root in range(len(gains)):
        owner[-1], here = root, num_columns
        slack, previous = [float("inf")] * num_columns, [num_columns] * num_columns
        path = [num_columns]
        free = set(range(num_columns))
        while (row := owner[here]) >= 0:
            for j in free:
                reduced = -gains[row][j] - row_price[row] - column_price[j]
                if reduced < slack[j]:
                    slack[j], previous[j] = reduced, here
            here = min(free, key=lambda j: (slack[j], j))
            step = slack[here]
            for j in path:
                row_price[owner[j]] += step
                column_price[j] -= step
            for j in free:
                slack[j] -= step
            free.remove(here)
            path.append(here)
        while here != num_columns:
            owner[here] = owner[previous[here]]
            here = previous[here]
    return sorted((row, j) for j, row in enumerate(owner[:-1]) if row >= 0)
