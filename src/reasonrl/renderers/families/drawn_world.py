"""The nano flow of the drawn world: 64x64 pictures of planned boxes, for tests and studies without an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size, flow_schedule
from reasonrl.scenes.flow import velocity

if TYPE_CHECKING:
    from PIL.Image import Image

_SIZE = (64, 64)


@final
class DrawnWorld(Family):
    """Draws with `scenes.flow.NanoFlow`; of a brief it reads the text's words and the objects, and no image."""

    @property
    def size(self) -> Size:
        """64 x 64, the only one."""
        return _SIZE

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Returns (C, 8, 8)."""
        if tuple(size) != _SIZE:
            raise ConfigError(f"the drawn world is {_SIZE[0]}x{_SIZE[1]}, got size {tuple(size)}: leave it out")
        side = self.pipe.transformer.config.sample_size
        return self.pipe.transformer.config.out_channels, side, side

    def encode(self, briefs: Sequence[Brief], size: Size) -> list[dict[str, Tensor]]:
        """Returns each brief's "embeds" (L, D), "pooled" (D,) and "map" (M, 8, 8), the boxes over the cells."""
        found: list[dict[str, Tensor]] = self.pipe.conditioner.encode(
            [brief.text for brief in briefs], [brief.objects for brief in briefs]
        )
        return found

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        """Returns the scheduler's sigmas."""
        return flow_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        """Returns the velocity; the map goes in as further channels of the latents (`flow.velocity` says what out)."""
        output: Tensor = self.denoiser(
            hidden_states=torch.cat([x, conditions["map"].to(x)], 1),
            timestep=inputs * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditions["embeds"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return velocity(x, output, inputs)

    def decode(self, latents: Tensor) -> list[Image]:
        """Returns pictures of the codebook's patches only."""
        found: list[Image] = self.pipe.latents.decode(latents)
        return found
