"""Packing: what the transformers of flow families share. Latents become tokens, and a picture to edit latents.

Latents are (N, C, H, W) everywhere else. FLUX.1 and Qwen-Image see a token for each patch of 2 x 2 latents, with
positions; the latents of FLUX.2 are patches already. Tokens of a picture to edit follow those of the picture drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.renderers.family import Brief, Schedule, Size, flow_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


def patch_grid(pipe: Any, size: Size) -> tuple[int, int]:
    """Returns the rows and columns of 2 x 2 patches of a picture; ConfigError where they do not fill it."""
    side = 2 * pipe.vae_scale_factor
    if min(size) < 1 or any(pixels % side for pixels in size):
        raise ConfigError(
            f"{type(pipe).__name__} draws patches of {side} x {side} pixels, got a size of {size[0]} x {size[1]}:"
            f" give a height and a width that {side} divides"
        )
    return size[0] // side, size[1] // side


def pack(latents: Tensor) -> Tensor:
    """Returns (N, H/2 · W/2, 4C) tokens of (N, C, H, W) latents: patches of 2 x 2, row by row."""
    return rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """Returns the (N, C, H, W) latents of `pack`'s tokens; `height` is H."""
    return rearrange(tokens, "n (h w) (c p q) -> n c (h p) (w q)", h=height // 2, p=2, q=2)


def positions(height: int, width: int, like: Tensor, *, first: int = 0) -> Tensor:
    """Returns (H · W, 3) of (first, row, column) a token; `first` is 0 for the picture drawn, not for one to edit."""
    grid = torch.cartesian_prod(torch.tensor([first]), torch.arange(height), torch.arange(width))
    return grid.to(like.device, like.dtype)


def unshifted_schedule(scheduler: Any, num_steps: int, mu: float) -> Schedule:
    """Returns the schedule of pipelines that pass sigmas from 1 to 1/T of their own, for the scheduler to shift."""
    return flow_schedule(scheduler, num_steps, mu=mu, sigmas=np.linspace(1.0, 1 / num_steps, num_steps))


def model_time(inputs: Tensor, x: Tensor) -> Tensor:
    """Returns (K,) s as a transformer takes it: pipelines round 1000 s to the latents' dtype, and divide by 1000."""
    return (inputs * 1000).to(x.dtype) / 1000


def picture_to_edit(pipe: Any, brief: Brief, size: Size) -> Image:
    """Returns the brief's picture in RGB at the size drawn; ConfigError where it has none."""
    if brief.image is None:
        raise ConfigError(
            f"{type(pipe).__name__} edits a picture, and prompt.image is missing for {brief.text!r}:"
            " give every prompt an image, or load a pipeline that draws from text"
        )
    found: Image = pipe.image_processor.resize(brief.image.convert("RGB"), *size)
    return found


def picture_latents(pipe: Any, picture: Image, *, num_frames: int | None = None) -> Tensor:
    """Returns the mode of what the VAE encodes a picture as, with a leading axis, and not yet normalised.

    `num_frames` = 1 gives the VAE of a video model its frame axis, and keeps it.
    """
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(picture, picture.height, picture.width).to(vae.device, vae.dtype)
    pixels = pixels if num_frames is None else rearrange(pixels, "(n t) c h w -> n c t h w", t=num_frames)
    found: Tensor = vae.encode(pixels).latent_dist.mode()
    return found


def decode_scaled(pipe: Any, latents: Tensor) -> list[Image]:
    """Returns the pictures of (N, C, H, W) latents that were scaled and shifted by two numbers."""
    vae = pipe.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    found: list[Image] = pipe.image_processor.postprocess(vae.decode(scaled, return_dict=False)[0], output_type="pil")
    return found


# ---- Texts of any length, and VAEs with statistics of each channel --------------------------------------------------


def text_rows(embeds: Sequence[Tensor], mask: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Returns each text's "embeds" (L, D), without padding, and "mask" (L,), True: `collate` pads both with 0."""
    kept = embeds if mask is None else [each[real.bool()] for each, real in zip(embeds, mask, strict=True)]
    return [{"embeds": each, "mask": torch.ones(len(each), dtype=torch.bool, device=each.device)} for each in kept]


def check_unguided(pipe: Any) -> None:
    """Raises ConfigError for a Qwen-Image transformer with guidance distilled into it, which diffusers cannot run."""
    if pipe.transformer.config.guidance_embeds:
        raise ConfigError(
            f"the transformer of {type(pipe).__name__} has guidance_embeds, which diffusers has no embedding for:"
            " use a checkpoint without, and classifier-free guidance"
        )


def patch_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (4C, 1, 1) means and stds of the patches of FLUX.2's VAE: its batch normalisation holds them."""
    moments = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    mean, std = (rearrange(each.to(latents), "c -> c 1 1") for each in moments)
    return mean, std


def frame_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (C, 1, 1, 1) means and stds of the latents of Qwen-Image's VAE."""
    moments = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
    mean, std = rearrange(moments.to(latents), "two c -> two c 1 1 1")
    return mean, std


def decode_frames(pipe: Any, latents: Tensor) -> list[Image]:
    """Returns the pictures of Qwen-Image's (N, C, H, W) latents: videos of one frame."""
    frames = rearrange(latents.to(pipe.vae.dtype), "n c h w -> n c 1 h w")
    mean, std = frame_statistics(pipe.vae, frames)
    pixels = pipe.vae.decode(frames * std + mean, return_dict=False)[0]
    found: list[Image] = pipe.image_processor.postprocess(pixels[:, :, 0], output_type="pil")
    return found
