"""Qwen-Image-Edit (arXiv 2508.02324): Qwen-Image that edits; text encoder and transformer both see the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, resolution_shift
from reasonrl.renderers.packing import (
    check_unguided,
    decode_frames,
    frame_statistics,
    model_time,
    pack,
    patch_grid,
    picture_latents,
    picture_to_edit,
    text_rows,
    unpack,
    unshifted_schedule,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class QwenImageEdit(Family):
    """Edits with diffusers' QwenImageEditPipeline. The VAE's frame axis, of one frame, is left out of latents."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        check_unguided(pipe)

    @property
    def size(self) -> Size:
        """What the pipeline gives a square picture."""
        return 1024, 1024

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        rows, columns = patch_grid(self.pipe, size)
        return self.pipe.vae.config.z_dim, 2 * rows, 2 * columns

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's, read beside its picture, "embeds" (L, D) and "mask" (L,), and "image" (C, H, W)."""
        pictures = [picture_to_edit(self.pipe, brief, size) for brief in briefs]
        rows = text_rows(*self.pipe.encode_prompt([brief.text for brief in briefs], pictures))
        for row, picture in zip(rows, pictures, strict=True):
            latents = picture_latents(self.pipe, picture, num_frames=1)
            mean, std = frame_statistics(self.pipe.vae, latents)
            row["image"] = ((latents - mean) / std)[0, :, 0].to(row["embeds"])
        return rows

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by the tokens drawn where the scheduler says so."""
        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, resolution_shift(self.pipe.scheduler, rows * columns))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        drawn, shown = pack(x), pack(conditions["image"])
        mask = conditions["mask"]
        found: Tensor = self.denoiser(
            hidden_states=torch.cat([drawn, shown], 1),
            timestep=model_time(inputs, x),
            encoder_hidden_states=conditions["embeds"],
            encoder_hidden_states_mask=None if mask.all() else mask,  # without one, attention has faster kernels
            img_shapes=[[(1, x.shape[-2] // 2, x.shape[-1] // 2)] * 2] * len(x),
            return_dict=False,
        )[0]
        return unpack(found[:, : drawn.shape[1]], x.shape[-2])

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode_frames(self.pipe, latents)
