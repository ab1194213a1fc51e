"""Family: what differs between the text-to-image pipelines of diffusers, and nothing else.

An adapter wraps a loaded pipeline. It encodes what is drawn, says when the steps are, calls the denoiser once, and
decodes latents; guidance, steps, densities, boxes and replay are the renderer's. The entry point's name is the
pipeline's class: `StableDiffusion3Pipeline = "reasonrl.renderers.families.stable_diffusion_3:StableDiffusion3"`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from attrs import frozen
from torch import Tensor, nn

from reasonrl.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from reasonrl.plan import PlannedObject

Size = tuple[int, int]
"""(height, width) in pixels."""
Conditions = Mapping[str, Tensor]
"""What the denoiser sees besides the latents, by name; one row without the leading axis, or K rows with it."""
CHANNELS = "channels"
"""A condition of this name joins the latents along their channels, before the denoiser."""
ATTENTION = "attention."
"""Conditions whose names begin so are for attention processors, "attention.regions" as `regions`; they keep
their precision."""


@final
@frozen
class Brief:
    """What one picture is drawn from."""

    text: str
    objects: tuple[PlannedObject, ...] = ()
    """The plan's objects with boxes; empty where there is no plan."""
    image: Image | None = None
    """The picture to edit, or None."""


@final
@frozen(eq=False)
class Schedule:
    """When the T steps are."""

    times: Tensor
    """(T + 1,) float64, what `steps.Kernel` takes: a flow's s falls to 0; alpha_bar rises to 1."""
    inputs: Tensor
    """(T,) float32, what `Family.predict` takes with each: a flow's s, or the timestep of alpha_bar."""


class Family(ABC):
    """An adapter of a pipeline: about 60 lines. Everything is called without gradient, except `predict`."""

    flow: ClassVar[bool] = True
    """Whether the model is a rectified flow, and `predict` returns v = ε − x0; else variance-preserving, and ε."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoiser(self) -> nn.Module:
        """What is trained: the same object every time."""
        found: nn.Module = self.pipe.transformer
        return found

    @property
    def input_channels(self) -> int | None:
        """Channels that the denoiser takes, where latents go in as they are; None = they are packed, or joined here."""
        return None

    @property
    @abstractmethod
    def size(self) -> Size:
        """The pixels a picture has unless told otherwise."""

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns (C, H, W) of one picture's latents, unpacked; ConfigError for a size it cannot draw."""

    @abstractmethod
    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each brief's conditions, unpadded or with a mask among them; an empty text is unconditional.

        They do not depend on the other briefs but for float error.
        """

    @abstractmethod
    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the times that the pipeline's own scheduler has."""

    @abstractmethod
    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns (K, C, H, W) velocities (or ε) of K latents at (K,) `Schedule.inputs`; one call of the denoiser.

        Latents come in the denoiser's dtype; of variance-preserving models in float32, for the denoiser to be cast.
        Channels beyond the latents' own (`CHANNELS`) are the denoiser's affair.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> list[Image]:
        """Returns the pictures of (N, C, H, W) latents."""

    def collate(self, rows: Sequence[Conditions]) -> dict[str, Tensor]:
        """Returns K rows' conditions as one; shorter ones are padded with 0 behind, along their first axis."""
        kinds = {tuple(sorted(row)) for row in rows}
        if len(kinds) > 1:
            raise ConfigError(
                f"pictures drawn together have different conditions, {sorted(kinds)}: draw prompts with an image to"
                " edit and prompts without one in runs of their own"
            )
        found = {}
        for name, first in rows[0].items():
            each = [row[name] for row in rows]
            found[name] = nn.utils.rnn.pad_sequence(each, batch_first=True) if first.ndim else torch.stack(each)
        return found

    def save(self, folder: Path) -> None:
        """Writes what diffusers alone can load."""
        self.pipe.save_pretrained(folder)


def flow_schedule(scheduler: Any, num_steps: int, *, mu: float | None = None, sigmas: Any = None) -> Schedule:
    """Returns the sigmas of a FlowMatchEulerDiscreteScheduler: they are the flow's s.

    `mu` is the shift of a scheduler that shifts by resolution; `sigmas` are those that a pipeline passes, before it.
    """
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(num_steps, sigmas=sigmas, **({"mu": mu} if dynamic else {}))
    return Schedule(scheduler.sigmas.double().cpu(), scheduler.sigmas[:-1].float().cpu())


def alpha_bar_schedule(scheduler: Any, num_steps: int) -> Schedule:
    """Returns alpha_bar and timesteps of a DDIMScheduler.

    A step ends where the next begins. DDIMScheduler.step goes 1000 // T timesteps down instead: the same for the
    "leading" spacing that published models have, another place for "trailing" and "linspace".
    """
    scheduler.set_timesteps(num_steps)
    inputs = scheduler.timesteps.cpu()
    alphas = torch.cat([scheduler.alphas_cumprod.cpu()[inputs.long()], scheduler.final_alpha_cumprod.reshape(1).cpu()])
    return Schedule(alphas.double(), inputs.float())


def resolution_shift(scheduler: Any, num_tokens: int) -> float:
    """Returns mu of a scheduler that shifts by resolution: linear in the image's tokens (Flux, SD3.5, Qwen-Image)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    return float(least + (most - least) * (num_tokens - low) / (high - low))
