"""Images of the drawn world as 64 tokens and back, without loss: one token is one 8x8 patch.

Snapped boxes make the patches countable: 305 of solid objects, 1101 of all. No patch is learned.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonrl.errors import DataError
from reasonrl.scenes.world import (
    BACKGROUND,
    CELLS,
    COLORS,
    PATCH,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    sprite,
)

NUM_TOKENS = CELLS * CELLS
"""Tokens of an image, row by row."""
PLAIN = 0
"""The token of an empty cell."""
UNKNOWN = -1
"""What `lookup` says of a patch that no object has."""


def patches(pixels: NDArray[Any]) -> NDArray[Any]:
    """Returns (H, W, C) pixels as (H/8 · W/8, 8, 8, C) patches, row by row."""
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    split = pixels.reshape(rows, PATCH, columns, PATCH, -1).swapaxes(1, 2)
    return np.ascontiguousarray(split).reshape(rows * columns, PATCH, PATCH, -1)


@lru_cache(maxsize=1)
def _ids() -> dict[bytes, int]:
    ids = {np.full((PATCH, PATCH, 3), BACKGROUND, np.uint8).tobytes(): PLAIN}
    # Textures vary slowest, "solid" first: the first 305 ids are the solid world.
    for texture, shape, color, size in product(TEXTURES, SHAPES, COLORS, SIZES.values()):
        for patch in patches(sprite(shape, color, texture, size)):
            ids.setdefault(patch.tobytes(), len(ids))
    return ids


@lru_cache(maxsize=1)
def codebook() -> NDArray[np.uint8]:
    """Returns every patch, (1101, 8, 8, 3), read-only; id 0 is plain background.

    The order is fixed by the order of `world`'s words.
    """
    return np.frombuffer(b"".join(_ids()), np.uint8).reshape(-1, PATCH, PATCH, 3)


def lookup(image: Image.Image) -> NDArray[np.int64]:
    """Returns the (64,) tokens of an image, -1 where the patch is none of the codebook's."""
    ids = _ids()
    return np.array([ids.get(p.tobytes(), UNKNOWN) for p in patches(_pixels(image))], np.int64)


def encode(image: Image.Image) -> NDArray[np.int64]:
    """Returns the (64,) tokens of an image; raises DataError naming the first unknown cell."""
    tokens = lookup(image)
    unknown = np.flatnonzero(tokens == UNKNOWN)
    if len(unknown):
        row, column = divmod(int(unknown[0]), CELLS)
        raise DataError(
            f"cell (row {row}, column {column}) holds no patch of the drawn world, nor do "
            f"{len(unknown) - 1} others: encode images made by `draw`, or use `nearest`"
        )
    return tokens


def nearest(image: Image.Image) -> NDArray[np.int64]:
    """Returns the (64,) tokens whose patches are nearest to the image's in squared error."""
    book = codebook().reshape(len(codebook()), -1).astype(np.float32)
    seen = patches(_pixels(image)).reshape(NUM_TOKENS, -1).astype(np.float32)
    return ((book**2).sum(1) - 2 * seen @ book.T).argmin(1).astype(np.int64)


def decode(tokens: NDArray[np.integer[Any]]) -> Image.Image:
    """Returns the 64x64 image of 64 tokens; raises DataError for another number, or unknown ids."""
    tokens, book = np.asarray(tokens), codebook()
    if tokens.shape != (NUM_TOKENS,):
        raise DataError(f"an image is {NUM_TOKENS} tokens, got shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= len(book):
        wrong = sorted({int(t) for t in tokens if not 0 <= t < len(book)})
        raise DataError(f"image tokens must be in 0..{len(book) - 1}, got {wrong[:8]}")
    grid = book[tokens].reshape(CELLS, CELLS, PATCH, PATCH, 3)
    return Image.fromarray(grid.swapaxes(1, 2).reshape(SIDE, SIDE, 3))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.size != (SIDE, SIDE):
        raise DataError(f"an image of the drawn world is {SIDE}x{SIDE}, got {image.size}")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
