"""The drawn world: coloured, textured shapes on a grey 64x64 canvas, boxes on an 8 px grid.

Because boxes are snapped, the patches an image can contain are finite (`codec`), and what an image
shows can be read back without error (`parser`).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from itertools import combinations

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from PIL import Image

from reasonrl.errors import DataError
from reasonrl.plan import Box

SIDE = 64
"""Pixels of the canvas, each way."""
PATCH = 8
"""Pixels of a grid cell, each way; one image token draws one cell."""
CELLS = SIDE // PATCH
PLAN_SIDE = 1000
"""The canvas in a plan's units."""
STEP = PLAN_SIDE // CELLS
"""A cell's side in a plan's units: box edges are multiples of 125."""
BACKGROUND = (205, 205, 205)
INK = (15, 15, 15)
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 180),
    "orange": (240, 130, 30),
    "cyan": (40, 200, 210),
    "pink": (245, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SOLID = "solid"
TEXTURES = (SOLID, "banded", "striped", "checkered")
"""Plain, horizontal stripes, vertical stripes, a checkerboard: ink over the colour."""
SIZES = {"small": 16, "big": 24}
"""Pixels of a box, which is always square."""
STRIPE = 4
"""Pixels of a stripe, and of a field of the checkerboard."""
MOST_OBJECTS = 4
"""Objects in one prompt."""
OVERSAMPLING = 4
_ARM = 0.36  # half the width of a cross's arms, in half boxes


def check_word(word: str, known: Iterable[str], what: str) -> None:
    """Raises DataError with the nearest known word where `word` is not known."""
    known = tuple(known)
    if word not in known:
        near = get_close_matches(str(word), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise DataError(f"unknown {what} {word!r}: {hint}")


@frozen
class SceneObject:
    """One drawn object; its box is square, on the grid, 250 or 375 wide."""

    shape: str = field()
    color: str = field()
    texture: str = field()
    box: Box = field()

    @shape.validator
    def _check_shape(self, _: object, value: str) -> None:
        check_word(value, SHAPES, "shape")

    @color.validator
    def _check_color(self, _: object, value: str) -> None:
        check_word(value, COLORS, "colour")

    @texture.validator
    def _check_texture(self, _: object, value: str) -> None:
        check_word(value, TEXTURES, "texture")

    @box.validator
    def _check_box(self, _: object, box: Box) -> None:
        edges = (box.x0, box.y0, box.x1, box.y1)
        if any(edge % STEP or not 0 <= edge <= PLAN_SIDE for edge in edges):
            raise DataError(f"box {box} is off the grid: edges are multiples of {STEP} in 0..1000")
        sides = [size // PATCH * STEP for size in SIZES.values()]
        if box.width != box.height or box.width not in sides:
            raise DataError(f"box {box} must be a square of side {' or '.join(map(str, sides))}")

    @property
    def name(self) -> str:
        """The words for it: "striped red circle"; "solid" goes without saying."""
        return name_of(self.shape, self.color, self.texture)


def name_of(shape: str | None, color: str | None, texture: str | None) -> str:
    """Returns texture, colour and shape in this order, without "solid" and what is None."""
    return " ".join(word for word in (texture, color, shape) if word and word != SOLID)


@frozen
class Scene:
    """Objects at least one cell apart."""

    objects: tuple[SceneObject, ...] = field()

    @objects.validator
    def _check_gaps(self, _: object, objects: tuple[SceneObject, ...]) -> None:
        close = [
            f"{a.name} {a.box} and {b.name} {b.box}" for a, b in combinations(objects, 2) if not are_apart(a.box, b.box)
        ]
        if close:
            raise DataError(f"objects must be {STEP} apart, too close: {'; '.join(close)}")


def box_at(column: int, row: int, num_cells: int) -> Box:
    """Returns the square box whose top left cell is (column, row)."""
    return Box(*(STEP * cell for cell in (column, row, column + num_cells, row + num_cells)))


def are_apart(a: Box, b: Box) -> bool:
    """Returns whether an empty cell lies between two boxes, across or down."""
    across = max(a.x0, b.x0) - min(a.x1, b.x1)
    down = max(a.y0, b.y0) - min(a.y1, b.y1)
    return max(across, down) >= STEP


def draw(scene: Scene) -> Image.Image:
    """Returns the scene as a 64x64 RGB image, 4x supersampled."""
    pixels = np.full((SIDE, SIDE, 3), BACKGROUND, np.uint8)
    for item in scene.objects:
        box = item.box
        x0, y0, x1, y1 = (edge // STEP * PATCH for edge in (box.x0, box.y0, box.x1, box.y1))
        pixels[y0:y1, x0:x1] = sprite(item.shape, item.color, item.texture, x1 - x0)
    return Image.fromarray(pixels)


@cache
def sprite(shape: str, color: str, texture: str, size: int) -> NDArray[np.uint8]:
    """Returns one object on background, (size, size, 3), read-only."""
    fill = np.where(inked(texture, size)[..., None], INK, COLORS[color])
    cover = silhouette(shape, size)[..., None]
    pixels = np.rint(BACKGROUND + (fill - np.array(BACKGROUND)) * cover).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def silhouette(shape: str, size: int) -> NDArray[np.float64]:
    """Returns the covered fraction of each pixel, (size, size) in [0, 1]."""
    fine = size * OVERSAMPLING
    steps = (np.arange(fine) + 0.5) * 2 / fine - 1  # [-1, 1] across the box
    inside = is_inside(shape, steps[None, :], steps[:, None])
    return inside.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean((1, 3))


def is_inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns where a shape is, for x to the right and y down, in [-1, 1] of its box."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 1
    if shape == "triangle":
        return abs(x) <= (y + 1) / 2
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    return np.minimum(abs(x), abs(y)) <= _ARM  # cross


def inked(texture: str, size: int) -> NDArray[np.bool_]:
    """Returns which pixels of a box are ink, (size, size)."""
    odd = np.arange(size) // STRIPE % 2 == 1
    rows, columns = np.meshgrid(odd, odd, indexing="ij")
    patterns = {"banded": rows, "striped": columns, "checkered": rows ^ columns}
    return patterns.get(texture, np.zeros((size, size), bool))
