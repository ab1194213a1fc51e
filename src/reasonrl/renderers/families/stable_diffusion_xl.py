"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a UNet that also sees the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from einops import rearrange
from torch import Tensor, nn

from reasonrl.renderers.adapting import as_noise, attention_arguments, check_unet, decode, latent_shape
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, alpha_bar_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class StableDiffusionXL(Family):
    """Draws with diffusers' StableDiffusionXLPipeline; without its watermark."""

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
        side = int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        return latent_shape(self.pipe, size, 8)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D) and "pooled" (D,), and "sizes" (6,): as made, the crop's corner, as is.

        An empty text is zeros where the pipeline says so.
        """
        texts = [brief.text for brief in briefs]
        embeds, _, pooled, _ = self.pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        sizes = torch.tensor([*size, 0, 0, *size], dtype=embeds.dtype, device=embeds.device)
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        kept = [0.0 if zeros and not text else 1.0 for text in texts]
        return [
            {"embeds": e * keep, "pooled": p * keep, "sizes": sizes}
            for e, p, keep in zip(embeds, pooled, kept, strict=True)
        ]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's alpha_bar."""
        return alpha_bar_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns ε."""
        predicted = self.denoiser(
            x.to(self.pipe.unet.dtype),
            inputs,
            encoder_hidden_states=conditions["embeds"],
            added_cond_kwargs={"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]},
            cross_attention_kwargs=attention_arguments(conditions),
            return_dict=False,
        )[0]
        return as_noise(self.pipe.scheduler, predicted, x, inputs)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures; a float16 VAE that overflows is float32 meanwhile."""
        vae = self.pipe.vae
        dtype, config = vae.dtype, vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            moments = latents.new_tensor([config.latents_mean, config.latents_std])
            mean, std = rearrange(moments, "two c -> two c 1 1")
            latents = latents * std + mean * config.scaling_factor
        vae.to(torch.float32 if dtype == torch.float16 and config.force_upcast else dtype)
        found = decode(self.pipe, latents)
        vae.to(dtype)
        return found
