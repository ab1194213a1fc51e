"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): three text encoders, one transformer of both modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from torch import Tensor

from reasonrl.renderers.adapting import attention_arguments, decode, latent_shape
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, flow_schedule, resolution_shift

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class StableDiffusion3(Family):
    """Draws with diffusers' StableDiffusion3Pipeline."""

    @property
    def input_channels(self) -> int:
        """The transformer's, those of boxes included."""
        return int(self.pipe.transformer.config.in_channels)

    @property
    def size(self) -> Size:
        """The transformer's sample size, in pixels."""
        side = int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        config = self.pipe.transformer.config
        side = self.pipe.vae_scale_factor * config.patch_size
        return latent_shape(self.pipe, size, side, most=side * config.pos_embed_max_size)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D) and "pooled" (D,)."""
        texts = [brief.text for brief in briefs]
        embeds, _, pooled, _ = self.pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's sigmas, shifted by resolution where it says so."""
        _, height, width = self.latent_shape(size)
        patch = self.pipe.transformer.config.patch_size
        mu = resolution_shift(self.pipe.scheduler, (height // patch) * (width // patch))
        return flow_schedule(self.pipe.scheduler, num_steps, mu=mu)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        found: Tensor = self.denoiser(
            hidden_states=x.to(self.pipe.transformer.dtype),
            timestep=inputs * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditions["embeds"],
            pooled_projections=conditions["pooled"],
            joint_attention_kwargs=attention_arguments(conditions),
            return_dict=False,
        )[0]
        return found

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode(self.pipe, latents)
