"""Renderer: turns trajectories into images. (Elsewhere the word means a chat template; not here.)"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reasonrl.noise import Draw
    from reasonrl.types import Trajectory


class Renderer(ABC):
    """Adds images to trajectories; a trainable one is `class Flow(Renderer, Trainable)`."""

    provides: frozenset[str] = frozenset({"image"})
    """Artifacts it attaches, which a judge may need."""

    @abstractmethod
    def render(self, trajectories: Sequence[Trajectory], *, draw: Draw) -> list[Trajectory]:
        """Adds images; may branch: the k children of a trajectory follow each other.

        What cannot be drawn comes back without an image: that is data, not an exception.
        """
