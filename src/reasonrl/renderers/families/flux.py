"""FLUX.1: a transformer of both modalities over packed latents, guidance distilled into it (dev) or none (schnell)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, resolution_shift
from reasonrl.renderers.packing import (
    decode_scaled,
    model_time,
    pack,
    patch_grid,
    positions,
    unpack,
    unshifted_schedule,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class Flux(Family):
    """Draws with diffusers' FluxPipeline; a transformer with guidance distilled into it is fed `embedded_guidance`."""

    def __init__(self, pipe: Any, *, embedded_guidance: float = 3.5) -> None:
        super().__init__(pipe)
        self.embedded_guidance = embedded_guidance

    @property
    def size(self) -> Size:
        """The pipeline's default: 1024 x 1024."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        rows, columns = patch_grid(self.pipe, size)
        return self.pipe.vae.config.latent_channels, 2 * rows, 2 * columns

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (512, D), padding is attended to, and "pooled" (D,)."""
        embeds, pooled, _ = self.pipe.encode_prompt([brief.text for brief in briefs], None)
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by resolution where the scheduler says so."""
        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, resolution_shift(self.pipe.scheduler, rows * columns))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        height, width = x.shape[-2:]
        guided = self.pipe.transformer.config.guidance_embeds
        found: Tensor = self.denoiser(
            hidden_states=pack(x),
            timestep=model_time(inputs, x),
            guidance=torch.full((len(x),), self.embedded_guidance, device=x.device) if guided else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["embeds"],
            txt_ids=x.new_zeros(conditions["embeds"].shape[1], 3),
            img_ids=positions(height // 2, width // 2, x),
            return_dict=False,
        )[0]
        return unpack(found, height)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode_scaled(self.pipe, latents)
