"""The exact parser: an object counts if every one of its patches is right and it stands alone.

Nothing is guessed, so nothing can be fooled: random tokens hold no objects, and one wrong patch
removes the object it is in.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image

from reasonrl.errors import DataError
from reasonrl.scenes.codec import NUM_TOKENS, PLAIN, encode, lookup
from reasonrl.scenes.world import (
    CELLS,
    COLORS,
    PATCH,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    box_at,
    draw,
)

_EDGES = sorted((size // PATCH for size in SIZES.values()), reverse=True)
_WIDTH = CELLS + 2  # with a frame of plain cells, beyond the canvas


@frozen
class Reading:
    """Whole objects, from the top left, and the other cells that are not background."""

    objects: tuple[SceneObject, ...]
    num_stray: int = 0


def read_image(image: Image.Image) -> Reading:
    """Returns what a 64x64 image shows; a patch that no object has is stray."""
    return read_tokens(lookup(image))


def read_tokens(tokens: NDArray[np.integer[Any]]) -> Reading:
    """Returns what 64 tokens show; an id that no object has is stray."""
    if np.shape(tokens) != (NUM_TOKENS,):
        raise DataError(f"an image is {NUM_TOKENS} tokens, got shape {np.shape(tokens)}")
    framed = np.pad(np.reshape(tokens, (CELLS, CELLS)), 1, constant_values=PLAIN).ravel().tolist()
    templates, found, claimed = _templates(), [], 0
    for start, window, ring, edge in _windows():
        kind = templates.get(tuple([framed[i] for i in window]))
        if kind is not None and not any(framed[i] != PLAIN for i in ring):
            row, column = divmod(start, _WIDTH)
            found.append((row, column, SceneObject(*kind, box_at(column - 1, row - 1, edge))))
            claimed += sum(framed[i] != PLAIN for i in window)
    num_stray = sum(token != PLAIN for token in framed) - claimed
    # Two windows never claim the same cell: shapes hang together and reach every side of their box.
    return Reading(tuple(item for _, _, item in sorted(found, key=lambda f: f[:2])), num_stray)


@lru_cache(maxsize=1)
def _windows() -> list[tuple[int, list[int], list[int], int]]:
    """Returns (top left, cells inside, cells around, edge) of every place an object can be."""
    places = []
    for edge in _EDGES:
        for row, column in product(range(1, CELLS - edge + 2), repeat=2):
            inside = [r * _WIDTH + c for r in range(row, row + edge) for c in range(column, column + edge)]
            wider = {
                r * _WIDTH + c for r in range(row - 1, row + edge + 1) for c in range(column - 1, column + edge + 1)
            }
            places.append((inside[0], inside, sorted(wider - set(inside)), edge))
    return places


@lru_cache(maxsize=1)
def _templates() -> dict[tuple[int, ...], tuple[str, str, str]]:
    """Returns (shape, colour, texture) by the tokens of the box: 320 templates, all different."""
    templates = {}
    for edge, *kind in product(_EDGES, SHAPES, COLORS, TEXTURES):
        shape, color, texture = kind
        alone = Scene((SceneObject(shape, color, texture, box_at(0, 0, edge)),))
        grid = encode(draw(alone)).reshape(CELLS, CELLS)[:edge, :edge]
        templates[tuple(grid.ravel().tolist())] = (shape, color, texture)
    return templates
