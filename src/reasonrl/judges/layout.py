"""A plan drawn as a picture: each box's outline on a white canvas, its name at its corner; what R_spa's judge looks at.

Colours only tell boxes apart: dark and muted, so that a "red cup" is not drawn in a bright blue. An edge that several
boxes share is dashed in all their colours, so identical boxes stay two. A label has its box's colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from reasonrl.plan import CANVAS, MAX_OBJECTS, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

COLORS = (
    (64, 64, 64),
    (134, 84, 48),
    (44, 92, 120),
    (112, 66, 120),
    (70, 104, 58),
    (136, 60, 76),
    (58, 66, 132),
    (112, 100, 40),
    (30, 110, 100),
    (84, 50, 34),
    (110, 110, 118),
    (20, 34, 56),
)
"""In order of appearance, then again; white text on each has a contrast of 4.5 or more (WCAG's AA)."""
WIDTH = 3
"""Pixels of an outline, inside its box."""
DASH = 8
"""Longest dash, in pixels, of an edge that boxes share."""
GAP = 2
"""Pixels between a box and a label beside it: a box of four pixels is still seen."""
LONGEST_LABEL = 24
"""Characters of a label; what is longer is cut, and says so."""
NAMELESS = "(no name)"
"""The label of a name without a printable character."""

Rectangle = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom are outside."""


@frozen
class Drawn:
    """A planned box as the picture shows it."""

    color: tuple[int, int, int]
    box: Rectangle
    text: str
    label: Rectangle


def draw_plan(plan: Plan, size: int = 448) -> Image.Image:
    """Returns the plan's boxes as a `size` x `size` RGB picture, the same for the same plan and Pillow.

    Objects without a box are not in it. The font is Pillow's own, which has ASCII only.
    """
    drawn = arranged(plan, size)
    picture = Image.fromarray(_outlines(drawn, size))
    pen = ImageDraw.Draw(picture)
    for each in drawn:
        if leader := _leader(each.label, each.box):
            pen.line(leader, fill=each.color)
    for each in drawn:
        picture.paste(_label(each, size), each.label[:2])
    return picture


def arranged(plan: Plan, size: int) -> list[Drawn]:
    """Returns what the picture shows, in the order of drawing: large boxes first, at most 32."""
    placed = [each for each in plan.objects if each.box is not None][:MAX_OBJECTS]
    boxes = [_pixels((b.x0, b.y0, b.x1, b.y1), size) for each in placed if (b := each.box)]
    order = sorted(range(len(boxes)), key=lambda i: (-_area(boxes[i]), i))
    texts = [_fitting(printable(placed[i].name), size) for i in order]
    rectangles = [boxes[i] for i in order]
    labels = _places(rectangles, [_extent(text, size) for text in texts], size)
    colors = [COLORS[i % len(COLORS)] for i in order]
    return [Drawn(*each) for each in zip(colors, rectangles, texts, labels, strict=True)]


def printable(name: str) -> str:
    """Returns a name as its label: one line of ASCII, at most 24 characters; accents go, other letters become "?"."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    line = " ".join("".join(c if c.isprintable() else " " for c in bare).split())
    line = line.encode("ascii", "replace").decode("ascii")
    return (line if len(line) <= LONGEST_LABEL else line[: LONGEST_LABEL - 1].rstrip() + "…") or NAMELESS


def _pixels(box: Sequence[int], size: int) -> Rectangle:
    """Returns the box in pixels, on the canvas and at least one outline wide, whatever it was."""
    xs, ys = sorted(box[::2]), sorted(box[1::2])
    left, right = (min(max(round(x * size / CANVAS), 0), size) for x in xs)
    top, bottom = (min(max(round(y * size / CANVAS), 0), size) for y in ys)
    left, top = min(left, size - WIDTH), min(top, size - WIDTH)
    return left, top, max(right, left + WIDTH), max(bottom, top + WIDTH)


def _area(box: Rectangle) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# ---- outlines ----


def _outlines(drawn: Sequence[Drawn], size: int) -> NDArray[np.uint8]:
    """Returns the outlines, small boxes on top; pixels of several boxes are theirs in turn, by dashes along x + y."""
    owner, claims = np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
    for number, each in enumerate(drawn):
        for side in _sides(each.box):
            owner[side] = number
            claims[side] += 1
    ys, xs = np.nonzero(claims > 1)
    if len(ys):
        owner[ys, xs] = _shared(np.array([each.box for each in drawn]), owner[ys, xs], xs, ys)
    colors = np.array([each.color for each in drawn] or [(255, 255, 255)], np.uint8)
    return np.where((claims > 0)[..., None], colors[owner], np.uint8(255))


def _shared(
    boxes: NDArray[np.int64], smallest: NDArray[np.int64], xs: NDArray[np.int64], ys: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns whose each shared pixel is: its claimants alternate, in dashes short enough to give each of them two."""
    left, top, right, bottom = (edge[:, None] for edge in boxes.T)
    outer = (left <= xs) & (xs < right) & (top <= ys) & (ys < bottom)
    inner = (left + WIDTH <= xs) & (xs < right - WIDTH) & (top + WIDTH <= ys) & (ys < bottom - WIDTH)
    mine = outer & ~inner
    count = mine.sum(0)
    width, height = (boxes[smallest, 2:] - boxes[smallest, :2]).T
    dash = np.clip((width + height) // (2 * count), 1, DASH)
    turn = (xs + np.where(dash > 1, 1, width) * ys) // dash % count  # the tiniest: each pixel another's, row by row
    chosen = (np.cumsum(mine, axis=0) == turn + 1) & mine
    return chosen.argmax(axis=0)


def _sides(box: Rectangle) -> list[tuple[slice, slice]]:
    """Returns the outline as rows and columns that do not overlap."""
    left, top, right, bottom = box
    under_top, inner_left = min(top + WIDTH, bottom), min(left + WIDTH, right)
    over_bottom, inner_right = max(bottom - WIDTH, under_top), max(right - WIDTH, inner_left)
    return [
        (slice(top, under_top), slice(left, right)),
        (slice(over_bottom, bottom), slice(left, right)),
        (slice(under_top, over_bottom), slice(left, inner_left)),
        (slice(under_top, over_bottom), slice(inner_right, right)),
    ]


# ---- labels ----


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=max(9, round(size / 32)))


def _extent(text: str, size: int) -> tuple[int, int]:
    """Returns the width and height of a label; all of one size are as high."""
    font = _font(size)
    ascent, descent = font.getmetrics()
    return int(font.getlength(text)) + 7, ascent + descent + 1


def _fitting(text: str, size: int) -> str:
    while len(text) > 1 and _extent(text, size)[0] > size:
        text = text[:-2] + "…"
    return text


def _label(drawn: Drawn, size: int) -> Image.Image:
    """Returns the label as a picture of its own, so that no glyph reaches beyond it."""
    left, top, right, bottom = drawn.label
    label = Image.new("RGB", (right - left, bottom - top), drawn.color)
    ImageDraw.Draw(label).text((3, 0), drawn.text, fill=(255, 255, 255), font=_font(size))
    return label


def _places(boxes: Sequence[Rectangle], extents: Sequence[tuple[int, int]], size: int) -> list[Rectangle]:
    """Returns where each label goes; the smallest boxes choose first, they have the fewest places."""
    taken: dict[int, Rectangle] = {}
    for own in reversed(range(len(boxes))):
        near = _corners(boxes[own], extents[own], size)
        place, cost = _best(near, own, boxes, list(taken.values()))
        if cost > _GOOD_ENOUGH:
            everywhere = np.concatenate([near, _grid(extents[own], size)])
            place, _ = _best(everywhere, own, boxes, list(taken.values()))
        taken[own] = place
    return [taken[own] for own in range(len(boxes))]


_GOOD_ENOUGH = 20.0
_STEP = 12


def _corners(box: Rectangle, extent: tuple[int, int], size: int) -> Floats:
    """Returns the places at a box's corners, (K, 4): inside the top left, above it, and so on."""
    left, top, right, bottom = box
    width, height = extent
    inside_x, inside_y = right - WIDTH - width, bottom - WIDTH - height
    starts = [
        (left + WIDTH, top + WIDTH),
        (left, top - height - GAP),
        (left, bottom + GAP),
        (left - width - GAP, top),
        (right + GAP, top),
        (right - width, top - height - GAP),
        (right - width, bottom + GAP),
        (left + WIDTH, inside_y),
        (inside_x, top + WIDTH),
        (inside_x, inside_y),
        (left - width - GAP, bottom - height),
        (right + GAP, bottom - height),
    ]
    return _rectangles(np.array(starts, np.float64), extent, size)


def _grid(extent: tuple[int, int], size: int) -> Floats:
    xs, ys = (np.arange(0, size + _STEP, _STEP, dtype=np.float64) for _ in range(2))
    return _rectangles(np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2), extent, size)


def _rectangles(starts: Floats, extent: tuple[int, int], size: int) -> Floats:
    """Returns (K, 4) labels that begin there, moved onto the canvas."""
    room = np.maximum(np.array([size, size]) - extent, 0)
    corner = np.clip(starts, 0, room)
    return np.concatenate([corner, corner + extent], axis=1)


def _best(places: Floats, own: int, boxes: Sequence[Rectangle], taken: Sequence[Rectangle]) -> tuple[Rectangle, float]:
    """Returns the place of least cost, the first of equals, and its cost."""
    cost = _cost(places, own, np.array(boxes, np.float64), np.array(taken, np.float64).reshape(-1, 4))
    at = int(cost.argmin())
    left, top, right, bottom = (int(edge) for edge in places[at])
    return (left, top, right, bottom), float(cost[at])


def _cost(places: Floats, own: int, boxes: Floats, taken: Floats) -> Floats:
    """Returns what is wrong with each place: a whole box hidden, a label, an outline, a foreign box, the distance."""
    label, area, mine = (places[:, 2:] - places[:, :2]).prod(1), (boxes[:, 2:] - boxes[:, :2]).prod(1), boxes[own]
    covered, labels = _overlaps(places, boxes), _overlaps(places, taken)
    inner = boxes + np.array([WIDTH, WIDTH, -WIDTH, -WIDTH])
    hidden = (covered - _overlaps(places, inner)) / (area - _overlaps(inner, inner).diagonal())
    corner = mine[:2]
    apart = np.maximum(np.maximum(places[:, :2] - corner, corner - places[:, 2:]), 0).sum(1)
    outside = covered[:, own] < label
    return (
        4000 * (covered >= area).any(1)
        + 1000 * (labels.sum(1) / label + labels.any(1))
        + 300 * np.maximum(hidden - 0.25, 0).sum(1)
        + 60 * hidden.sum(1)
        + 25 * _foreign(places, own, boxes, covered) / label
        + 0.3 * apart
        + 3 * outside
    )


def _foreign(places: Floats, own: int, boxes: Floats, covered: Floats) -> Floats:
    """Returns the area of each place in a box it could be taken to name: not its own, nor one around that."""
    area, mine = (boxes[:, 2:] - boxes[:, :2]).prod(1), boxes[own]
    both = np.concatenate([np.maximum(boxes[:, :2], mine[:2]), np.minimum(boxes[:, 2:], mine[2:])], axis=1)
    beyond = np.where(area < area[own], covered, covered - _overlaps(places, both))
    around = _overlaps(mine[None], boxes)[0] >= 0.9 * area[own]
    return np.where(around, 0, beyond).max(1)


def _overlaps(a: Floats, b: Floats) -> Floats:
    """Returns the area that each of a shares with each of b, (K, N)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1)


def _leader(label: Rectangle, box: Rectangle) -> tuple[int, int, int, int] | None:
    """Returns the shortest line from a label to its box, or None where they touch."""
    ends = [_closest((label[k], label[k + 2] - 1), (box[k], box[k + 2] - 1)) for k in (0, 1)]
    (x0, x1), (y0, y1) = ends
    return None if max(abs(x1 - x0), abs(y1 - y0)) <= GAP + 1 else (x0, y0, x1, y1)


def _closest(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Returns the nearest points of two intervals, the middle of what they share where they meet."""
    if a[1] < b[0]:
        return a[1], b[0]
    if b[1] < a[0]:
        return a[0], b[1]
    middle = (max(a[0], b[0]) + min(a[1], b[1])) // 2
    return middle, middle
