"""FLUX.1 Kontext (arXiv 2506.15742): FLUX.1 that edits; the picture's tokens follow those of the picture drawn."""

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
    picture_latents,
    picture_to_edit,
    positions,
    unpack,
    unshifted_schedule,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class FluxKontext(Family):
    """Edits with diffusers' FluxKontextPipeline; guidance distilled into the transformer is `embedded_guidance`."""

    def __init__(self, pipe: Any, *, embedded_guidance: float = 3.5) -> None:
        super().__init__(pipe)
        self.embedded_guidance = embedded_guidance

    @property
    def size(self) -> Size:
        """What the pipeline gives a square picture."""
        return 1024, 1024

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        rows, columns = patch_grid(self.pipe, size)
        return self.pipe.vae.config.latent_channels, 2 * rows, 2 * columns

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (512, D) and "pooled" (D,), and its picture's "image" latents (C, H, W)."""
        config = self.pipe.vae.config
        pictures = [picture_to_edit(self.pipe, brief, size) for brief in briefs]
        latents = torch.cat([picture_latents(self.pipe, picture) for picture in pictures])
        images = (latents - config.shift_factor) * config.scaling_factor
        embeds, pooled, _ = self.pipe.encode_prompt([brief.text for brief in briefs], None)
        rows = zip(embeds, pooled, images.to(embeds), strict=True)
        return [{"embeds": e, "pooled": p, "image": i} for e, p, i in rows]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by the tokens drawn where the scheduler says so."""
        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, resolution_shift(self.pipe.scheduler, rows * columns))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        drawn, shown = pack(x), pack(conditions["image"])
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        guided = self.pipe.transformer.config.guidance_embeds
        found: Tensor = self.denoiser(
            hidden_states=torch.cat([drawn, shown], 1),
            timestep=model_time(inputs, x),
            guidance=torch.full((len(x),), self.embedded_guidance, device=x.device) if guided else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["embeds"],
            txt_ids=x.new_zeros(conditions["embeds"].shape[1], 3),
            img_ids=torch.cat([positions(rows, columns, x), positions(rows, columns, x, first=1)]),
            return_dict=False,
        )[0]
        return unpack(found[:, : drawn.shape[1]], x.shape[-2])

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode_scaled(self.pipe, latents)
