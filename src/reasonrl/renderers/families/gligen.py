"""GLIGEN (arXiv 2301.07093): Stable Diffusion whose gated attention sees named boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from reasonrl.plan import CANVAS, PlannedObject
from reasonrl.renderers.adapting import as_noise, attention_arguments, check_unet, decode, latent_shape
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, alpha_bar_schedule

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BOXES = 30
"""Boxes that the model was trained with; those behind are left out, as the pipeline does."""


@final
class GLIGEN(Family):
    """Draws with diffusers' StableDiffusionGLIGENPipeline, its boxes seen at all steps; no safety checker is asked."""

    flow: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        check_unet(pipe)
        pipe.enable_fuser(True)  # the pipeline's call leaves it as its last step had it

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
        side = int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)
        return side, side

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the VAE's (C, H, W)."""
        return latent_shape(self.pipe, size, 8)

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each text's "embeds" (L, D), and 30 "boxes" (30, 4) in [0, 1], "phrases" (30, D) and "mask" (30,).

        Objects without a box are left out; none at all is what the pipeline calls unconditional.
        """
        texts = [brief.text for brief in briefs]
        embeds, _ = self.pipe.encode_prompt(texts, self.pipe._execution_device, 1, False)
        return [{"embeds": row, **self._grounded(b.objects, row)} for b, row in zip(briefs, embeds, strict=True)]

    def _grounded(self, objects: Sequence[PlannedObject], like: Tensor) -> dict[str, Tensor]:
        placed = [(each.name, each.box) for each in objects if each.box is not None][:MAX_BOXES]
        count, width = len(placed), self.pipe.unet.config.cross_attention_dim
        found = {"boxes": like.new_zeros(MAX_BOXES, 4), "phrases": like.new_zeros(MAX_BOXES, width)}
        found["mask"] = (torch.arange(MAX_BOXES, device=like.device) < count).to(like.dtype)
        if placed:
            names = [name for name, _ in placed]
            tokens = self.pipe.tokenizer(names, padding=True, truncation=True, return_tensors="pt").to(like.device)
            found["phrases"][:count] = self.pipe.text_encoder(**tokens).pooler_output
            corners = [[box.x0, box.y0, box.x1, box.y1] for _, box in placed]
            found["boxes"][:count] = torch.tensor(corners, device=like.device) / CANVAS
        return found

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's alpha_bar."""
        return alpha_bar_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns ε."""
        boxes, phrases, mask = (conditions[name] for name in ("boxes", "phrases", "mask"))
        seen = {"gligen": {"boxes": boxes, "positive_embeddings": phrases, "masks": mask}}
        predicted = self.denoiser(
            x.to(self.pipe.unet.dtype),
            inputs,
            encoder_hidden_states=conditions["embeds"],
            cross_attention_kwargs=seen | (attention_arguments(conditions) or {}),
            return_dict=False,
        )[0]
        return as_noise(self.pipe.scheduler, predicted, x, inputs)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the VAE's pictures."""
        return decode(self.pipe, latents)
