"""Stable Diffusion 1 and 2 (arXiv 2112.10752): one text encoder, a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from reasonrl.renderers.adapting import as_noise, attention_arguments, check_unet, decode, latent_shape
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, alpha_bar_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class StableDiffusion(Family):
    """Draws with diffusers' StableDiffusionPipeline; its safety checker is not asked."""

    flow: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        check_unet(pipe)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        found: nn.Module = self.pipe.unet
        return found

    @property
    def input_channels(self) -> int:
        """The UNet's, those of boxes included."""
        return int(self.pipe.unet.config.in_channels)

    @property
    def size(self) -> Size:
        """The UNet's sample size, in pixels."""
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        return latent_shape(self.pipe, size, 8)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D)."""
        texts = [brief.text for brief in briefs]
        embeds, _ = self.pipe.encode_prompt(texts, self.pipe._execution_device, 1, False)
        return [{"embeds": row} for row in embeds]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's alpha_bar."""
        return alpha_bar_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns ε."""
        predicted = self.denoiser(
            x.to(self.pipe.unet.dtype),
            inputs,
            encoder_hidden_states=conditions["embeds"],
            cross_attention_kwargs=attention_arguments(conditions),
            return_dict=False,
        )[0]
        return as_noise(self.pipe.scheduler, predicted, x, inputs)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode(self.pipe, latents)
