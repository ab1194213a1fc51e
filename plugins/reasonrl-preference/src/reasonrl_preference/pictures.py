"""Pixels as a CLIP wants them: cropped at the centre by the stock processor, or whole and padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional


def cropped(image: Image, *, processor: Any) -> Tensor:
    """Returns (C, H, W) float32: what the checkpoint's own image processor makes of it."""
    pixels: Tensor = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    return pixels[0]


def padded(image: Image, *, side: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Returns (C, side, side) float32: the whole picture, its longer edge scaled to `side`, centred on black.

    HPSv2's own order: scaled in float by antialiased bicubics without clamping, then padded, then normalised. A
    picture whose longer edge fits already is padded too, which the original forgets.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    pixels = rearrange(pixels, "h w c -> 1 c h w")
    scale = side / max(pixels.shape[-2:])
    height, width = (max(1, round(edge * scale)) for edge in pixels.shape[-2:])
    if scale != 1:
        pixels = functional.interpolate(
            pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
    left, top = (side - width) // 2, (side - height) // 2
    pixels = functional.pad(pixels, (left, side - width - left, top, side - height - top))
    whole = rearrange(pixels, "1 c h w -> c h w")
    return (whole - rearrange(mean, "c -> c 1 1")) / rearrange(deviation, "c -> c 1 1")
