"""Z-Image (arXiv 2511.22699): one stream of text and latents; its time runs from noise at 0 to data at 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, resolution_shift
from reasonrl.renderers.packing import decode_scaled, patch_grid, text_rows, unshifted_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class ZImage(Family):
    """Draws with diffusers' ZImagePipeline."""

    @property
    def size(self) -> Size:
        """The pipeline's default."""
        return 1024, 1024

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        rows, columns = patch_grid(self.pipe, size)
        return self.pipe.vae.config.latent_channels, 2 * rows, 2 * columns

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D) and "mask" (L,), all True: padding has False."""
        embeds, _ = self.pipe.encode_prompt([brief.text for brief in briefs], do_classifier_free_guidance=False)
        return text_rows(embeds)

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by resolution where the scheduler says so."""
        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, resolution_shift(self.pipe.scheduler, rows * columns))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity: the model's is x0 − ε, at (1000 − 1000 s) / 1000."""
        texts = [embeds[mask] for embeds, mask in zip(conditions["embeds"], conditions["mask"], strict=True)]
        found: list[Tensor] = self.denoiser(
            list(x.unsqueeze(2)), (1000 - inputs * 1000) / 1000, texts, return_dict=False
        )[0]
        return -torch.stack(found).squeeze(2)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode_scaled(self.pipe, latents)
