"""FLUX.2 klein: one language model reads the text, latents are patches already, and a picture to edit is optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from reasonrl.errors import ConfigError
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size
from reasonrl.renderers.packing import (
    model_time,
    patch_grid,
    patch_statistics,
    picture_latents,
    picture_to_edit,
    positions,
    unshifted_schedule,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_EDITED = 10
"""The first position of the tokens of a picture to edit."""


@final
class Flux2Klein(Family):
    """Draws with diffusers' Flux2KleinPipeline, and edits the picture of a brief that has one."""

    @property
    def size(self) -> Size:
        """The pipeline's default: 1024 x 1024."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns (4C, H/2, W/2) of the VAE's (C, H, W): patches of 2 x 2 are channels."""
        return 4 * self.pipe.vae.config.latent_channels, *patch_grid(self.pipe, size)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (512, D), padding is attended to, and its picture's "image" if it has one."""
        embeds, _ = self.pipe.encode_prompt([brief.text for brief in briefs])
        rows = [{"embeds": each} for each in embeds]
        for brief, row in zip(briefs, rows, strict=True):
            if brief.image is not None:
                latents = picture_latents(self.pipe, picture_to_edit(self.pipe, brief, size))
                patches = rearrange(latents, "1 c (h p) (w q) -> (c p q) h w", p=2, q=2)
                mean, std = patch_statistics(self.pipe.vae, patches)
                row["image"] = ((patches - mean) / std).to(embeds)
        return rows

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by resolution and number of steps where the scheduler says so."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, compute_empirical_mu(rows * columns, num_steps))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        pictures = [(x, 0)] + ([(conditions["image"], _EDITED)] if "image" in conditions else [])
        rows, columns = x.shape[-2:]
        texts = torch.arange(conditions["embeds"].shape[1], device=x.device)
        found: Tensor = self.denoiser(
            hidden_states=torch.cat([rearrange(latents, "n c h w -> n (h w) c") for latents, _ in pictures], 1),
            timestep=model_time(inputs, x),
            encoder_hidden_states=conditions["embeds"],
            txt_ids=pad(texts[:, None], (3, 0)),
            img_ids=pad(torch.cat([positions(rows, columns, texts, first=first) for _, first in pictures]), (0, 1)),
            return_dict=False,
        )[0]
        return rearrange(found[:, : rows * columns], "n (h w) c -> n c h w", h=rows)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        mean, std = patch_statistics(self.pipe.vae, latents)
        unpatched = rearrange(latents * std + mean, "n (c p q) h w -> n c (h p) (w q)", p=2, q=2)
        pixels = self.pipe.vae.decode(unpatched.to(self.pipe.vae.dtype), return_dict=False)[0]
        found: list[Image] = self.pipe.image_processor.postprocess(pixels, output_type="pil")
        return found

    def collate(self, rows: Sequence[Conditions]) -> dict[str, Tensor]:
        """Returns K rows' conditions as one; ConfigError where some have a picture to edit and some have none."""
        num_edits = sum("image" in row for row in rows)
        if 0 < num_edits < len(rows):
            raise ConfigError(
                f"Flux2KleinPipeline draws rows of one kind together, and {num_edits} of {len(rows)} have prompt.image:"
                " give every prompt of a run an image, or none"
            )
        return super().collate(rows)
