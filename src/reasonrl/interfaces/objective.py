"""Objective: rewards to advantages, replayed log-probs to a loss. Pure mathematics: no model, no files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reasonrl.types import Loss, Replay, Rewards, Stage


class Objective(ABC):
    """What is optimised for the stages it is given (its claim)."""

    @property
    def needs(self) -> frozenset[str]:
        """What it wants of a replay: "log_probs", "entropy", or a name in `Replay.extras`."""
        return frozenset({"log_probs"})

    @property
    def shadows(self) -> Mapping[str, Callable[[int], float]]:
        """Named weights to replay as well, each with its decay(step): 1 keeps the reference, 0 follows each step."""
        return {}

    @property
    def whole_groups(self) -> bool:
        """Whether its loss couples the rows of a group, which then share a pass."""
        return False

    @property
    def smallest_group(self) -> int:
        """The fewest members a group may have."""
        return 1

    @property
    def module(self) -> nn.Module | None:
        """Its own state, if any; the parameters join the optimizer."""
        return None

    def prepare(self, stage: Stage) -> Stage:
        """Adds what must be drawn once for all weights: noised points, hidden positions."""
        return stage

    @abstractmethod
    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns (M,) float32 advantages and (M,) bool: takes part in the loss."""

    def count(self, mask: Tensor) -> Tensor:
        """Returns the normaliser of these (N, T) trained actions; additive over rows."""
        return mask.sum()

    @abstractmethod
    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the sum over trained actions; the loop divides it by the step's count."""
