"""What can be trained: it draws stages, and replays them with gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from reasonrl.types import Batch, Replay


class Trainable(ABC):
    """Something that draws stages and can replay them with gradient."""

    factorised: bool = False
    """True: an action's replay needs no other action's activations (denoising steps)."""

    @property
    @abstractmethod
    def stages(self) -> tuple[str, ...]:
        """The stages it draws, in order."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The weights: the same object every time. Parameters are touched only inside its forward."""

    @property
    @abstractmethod
    def offers(self) -> Mapping[str, frozenset[str]]:
        """What replay can return, by stage: "log_probs", "entropy", or a name in `Replay.extras`."""

    @abstractmethod
    def replay(self, batch: Batch, needs: Mapping[str, frozenset[str]]) -> dict[str, Replay]:
        """Returns exactly the stages in `needs`; exact where mask is True, of the distribution it sampled from."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights and whatever else loading them needs, in the format of its own library."""
