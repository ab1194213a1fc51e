"""Sana (arXiv 2410.10629): a language model's text, linear attention over latents of 32 × 32 pixels each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from torch import Tensor

from reasonrl.renderers.adapting import decode, latent_shape
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, flow_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class Sana(Family):
    """Draws with diffusers' SanaPipeline, at the size asked for: without its binning of resolutions."""

    @property
    def size(self) -> Size:
        """The transformer's sample size, in pixels."""
        side = int(self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor)
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        return latent_shape(self.pipe, size, 32)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D) and "mask" (L,).

        The pipeline's own instruction ("Given a user prompt, generate ...") stands before a text, not before none.
        """
        texts = list(dict.fromkeys(brief.text for brief in briefs))
        instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        rows: dict[str, dict[str, Tensor]] = {}
        for before, group in ((instruction, [t for t in texts if t]), (None, [t for t in texts if not t])):
            if group:
                found = self.pipe.encode_prompt(group, False, complex_human_instruction=before)[:2]
                rows |= {text: {"embeds": e, "mask": m} for text, e, m in zip(group, *found, strict=True)}
        return [dict(rows[brief.text]) for brief in briefs]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's sigmas."""
        return flow_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity; a variance that the model predicts behind it is left out."""
        transformer = self.pipe.transformer
        scale = self.pipe.scheduler.config.num_train_timesteps * transformer.config.timestep_scale
        found: Tensor = self.denoiser(
            hidden_states=x.to(transformer.dtype),
            encoder_hidden_states=conditions["embeds"].to(transformer.dtype),
            encoder_attention_mask=conditions["mask"],
            timestep=inputs * scale,
            return_dict=False,
        )[0]
        return found[:, : self.pipe.vae.config.latent_channels]

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode(self.pipe, latents)
