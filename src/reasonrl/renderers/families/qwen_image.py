"""Qwen-Image (arXiv 2508.02324): a vision-language model reads the text, a transformer draws packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, resolution_shift
from reasonrl.renderers.packing import (
    check_unguided,
    decode_frames,
    model_time,
    pack,
    patch_grid,
    text_rows,
    unpack,
    unshifted_schedule,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class QwenImage(Family):
    """Draws with diffusers' QwenImagePipeline. The VAE's frame axis, of one frame, is left out of latents."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        check_unguided(pipe)

    @property
    def size(self) -> Size:
        """The pipeline's default: 1024 x 1024."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        rows, columns = patch_grid(self.pipe, size)
        return self.pipe.vae.config.z_dim, 2 * rows, 2 * columns

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D) and "mask" (L,), all True: padding has False."""
        return text_rows(*self.pipe.encode_prompt([brief.text for brief in briefs], max_sequence_length=512))

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the pipeline's sigmas, shifted by resolution where the scheduler says so."""
        rows, columns = patch_grid(self.pipe, size)
        return unshifted_schedule(self.pipe.scheduler, num_steps, resolution_shift(self.pipe.scheduler, rows * columns))

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        height, width = x.shape[-2:]
        mask = conditions["mask"]
        found: Tensor = self.denoiser(
            hidden_states=pack(x),
            timestep=model_time(inputs, x),
            encoder_hidden_states=conditions["embeds"],
            encoder_hidden_states_mask=None if mask.all() else mask,  # without one, attention has faster kernels
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(found, height)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode_frames(self.pipe, latents)
