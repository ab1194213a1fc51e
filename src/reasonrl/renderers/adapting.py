"""Adapting: what the UNets' families, Stable Diffusion 3 and Sana do alike: sizes, ε of any prediction, decoding."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.renderers.family import ATTENTION, Conditions, Size

if TYPE_CHECKING:
    from PIL.Image import Image


def latent_shape(pipe: Any, size: Size, multiple: int, *, most: int | None = None) -> tuple[int, ...]:
    """Returns the VAE's (C, H, W); ConfigError for sides over `most`, or not divided by `multiple` and by a latent."""
    side = lcm(multiple, pipe.vae_scale_factor)
    if any(pixels < 1 or pixels % side or (most is not None and pixels > most) for pixels in size):
        up_to = "" if most is None else f", and at most {most}"
        raise ConfigError(
            f"{type(pipe).__name__} cannot draw a size of {size[0]} x {size[1]}:"
            f" give a height and a width that {side} divides{up_to}"
        )
    return pipe.vae.config.latent_channels, size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor


def attention_arguments(conditions: Conditions) -> dict[str, Any] | None:
    """Returns what the attention processors get besides the usual; None = nothing."""
    found = {name.removeprefix(ATTENTION): value for name, value in conditions.items() if name.startswith(ATTENTION)}
    return found or None


def decode(pipe: Any, latents: Tensor) -> list[Image]:
    """Returns the pictures of (N, C, H, W) latents that were scaled by a number, and shifted where the VAE has one."""
    config = pipe.vae.config
    latents = latents.to(pipe.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    found: list[Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return found


# ---- Variance-preserving models --------------------------------------------------------------------


def check_unet(pipe: Any) -> None:
    """Raises ConfigError for a variance-preserving model that predicts neither ε nor v, or takes the guidance scale."""
    kind = pipe.scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"{type(pipe).__name__} has a {type(pipe.scheduler).__name__} of prediction_type {kind!r}, expected"
            " 'epsilon' or 'v_prediction': load a checkpoint that predicts one of them"
        )
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ConfigError(
            f"the UNet of {type(pipe).__name__} is distilled, with the guidance scale among its inputs"
            f" (time_cond_proj_dim {pipe.unet.config.time_cond_proj_dim}): load the checkpoint it was distilled from"
        )


def alpha_bar(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Returns (K,) alpha_bar of (K,) timesteps; between whole ones, linear in the timestep."""
    table = scheduler.alphas_cumprod.to(timesteps.device)
    below = timesteps.floor().long().clamp(0, len(table) - 1)
    return torch.lerp(table[below], table[(below + 1).clamp(max=len(table) - 1)], timesteps - below)


def as_noise(scheduler: Any, predicted: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
    """Returns ε of what a UNet predicts of x: itself, or √A v + √(1−A) x of v = √A ε − √(1−A) x0, A = alpha_bar.

    Channels that x has behind the prediction's are no latents, and not looked at.
    """
    if scheduler.config.prediction_type == "epsilon":
        return predicted
    share = rearrange(alpha_bar(scheduler, timesteps), "k -> k 1 1 1")
    return share.sqrt() * predicted + (1 - share).sqrt() * x[:, : predicted.shape[1]]
