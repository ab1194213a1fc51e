"""Transformers of Stable Diffusion 3 by size, with random weights: time and memory do not ask what they learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from attrs import frozen
from einops import rearrange
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.noise import Draw, normal
from reasonrl.renderers import pipelines
from reasonrl.renderers.boxes import Native
from reasonrl.renderers.families.stable_diffusion_3 import StableDiffusion3
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, flow_schedule
from reasonrl.renderers.pipelines import DTYPES, Learns

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 8
"""Of a latent, along each side."""
SHIFT = 3.0
"""Of the schedule, as published."""


@frozen
class Model:
    """What time and memory depend on: the configuration of a transformer, and how much it sees at once."""

    name: str
    layers: int
    heads: int
    side: int
    """Latents along each side of a picture."""
    words: int
    """Tokens of text."""
    text_width: int
    pooled_width: int
    dual_layers: int
    """The first so many layers let the image attend to itself a second time."""
    most_side: int
    """Positions along a side that it has embeddings for."""
    head_width: int = 64
    channels: int = 16


MODELS = {
    model.name: model
    for model in (
        Model("tiny", 2, 2, 8, 5, 24, 20, dual_layers=1, most_side=12, head_width=8, channels=4),
        Model("small", 6, 6, 32, 77, 768, 512, dual_layers=3, most_side=96),
        # The published configuration at 512 px; text is CLIP's 77 tokens and T5's 256.
        Model("sd3.5-medium", 24, 24, 64, 333, 4096, 2048, dual_layers=13, most_side=384),
    )
}
FULL = "sd3.5-medium"


def named_model(name: str) -> Model:
    """Returns a model; raises ConfigError for a name that is none."""
    if name not in MODELS:
        raise ConfigError(f"--size takes one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]


@frozen(eq=False)
class Parts:
    """What of a pipeline is measured; there are no text encoders and no VAE."""

    transformer: Any
    scheduler: Any

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name, as a pipeline of diffusers has them."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}


@final
class RandomText(Family):
    """The adapter of Stable Diffusion 3 over random conditions instead of encoded texts: a text has its own."""

    def __init__(self, parts: Parts, model: Model) -> None:
        super().__init__(parts)
        self._model = model
        self._adapter = StableDiffusion3(parts)

    @property
    def size(self) -> Size:
        """The model's, in pixels."""
        return self._model.side * PIXELS, self._model.side * PIXELS

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns (C, H, W)."""
        return self._model.channels, size[0] // PIXELS, size[1] // PIXELS

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns "embeds" (L, D) and "pooled" (D,), standard normals."""
        model = self._model
        shapes = {"embeds": (model.words, model.text_width), "pooled": (model.pooled_width,)}
        return [
            {name: normal([Draw(0, 0).key(brief.text, (), name)], *shape)[0] for name, shape in shapes.items()}
            for brief in briefs
        ]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's sigmas."""
        return flow_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity."""
        return self._adapter.predict(x, inputs, conditions)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns a pixel a latent, its first three channels as colours: a VAE is not what is measured."""
        from PIL import Image

        colours = latents[:, :3].float().sigmoid().mul(255).byte().cpu()
        return [Image.fromarray(each.numpy()) for each in rearrange(colours, "n c h w -> n h w c").contiguous()]


def build(model: Model, *, dtype: str, learns: Learns, device: torch.device, seed: int = 0) -> RandomText:
    """Returns a model whose weights are drawn on their device, the same for a seed, ready to learn.

    Adapters begin away from 0, so that both their halves have a gradient.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    with pipelines.quiet(), device, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        transformer: Any = SD3Transformer2DModel(
            sample_size=model.side,
            in_channels=model.channels,
            out_channels=model.channels,
            num_layers=model.layers,
            attention_head_dim=model.head_width,
            num_attention_heads=model.heads,
            joint_attention_dim=model.text_width,
            caption_projection_dim=model.heads * model.head_width,
            pooled_projection_dim=model.pooled_width,
            pos_embed_max_size=model.most_side,
            dual_attention_layers=tuple(range(model.dual_layers)),
            qk_norm="rms_norm",
        )
        transformer.to(DTYPES[dtype]).requires_grad_(False).eval()
    family = RandomText(Parts(transformer, FlowMatchEulerDiscreteScheduler(shift=SHIFT)), model)
    pipelines._prepare(family, learns, Native())
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in transformer.named_parameters():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=noise) * 0.02)
    transformer.to(device)
    return family
