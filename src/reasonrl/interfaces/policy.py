"""Policy: writes the reasoning, and for unified models the image tokens too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasonrl.interfaces.trainable import Trainable

if TYPE_CHECKING:
    from reasonrl.noise import Draw
    from reasonrl.types import Prompt, Trajectory


class Policy(Trainable):
    """Draws trajectories for prompts. Construction loads nothing."""

    provides: frozenset[str] = frozenset()
    """Artifacts it attaches, which a judge may need."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], *, group_size: int, draw: Draw) -> list[Trajectory]:
        """Draws whole groups, contiguous, under no_grad: row p * group_size + g belongs to prompt p.

        All randomness comes from `draw`, addressed by (prompt id, member, stage).
        """

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError, naming the prompt's id, for a prompt it cannot read; called before a run."""

    def foretell(self, prompts: Sequence[Prompt], *, group_size: int) -> list[str]:
        """Returns what a run should say before it begins: how it will draw, in lines; raises where it cannot."""
        return []


class Teachable(ABC):
    """A policy or renderer that can learn from demonstrations."""

    @abstractmethod
    def encode(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Adds the segments that these texts and images would have come from."""
