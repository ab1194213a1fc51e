"""World: what the loop asks of the other processes. Solo is one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from attrs import frozen
from torch import Tensor, nn


class World(Protocol):
    """Sums, maxima and gathers over ranks."""

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over ranks."""

    def max(self, value: int) -> int:
        """Returns the maximum over ranks."""

    def gather(self, values: list[Any]) -> list[Any]:
        """Returns the values of all ranks, in rank order."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over ranks."""


@frozen
class Solo:
    """One process: everything is already whole."""

    def sum(self, value: Tensor) -> Tensor:
        """Returns the value."""
        return value

    def max(self, value: int) -> int:
        """Returns the value."""
        return value

    def gather(self, values: list[Any]) -> list[Any]:
        """Returns the values."""
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves the gradients as they are."""
