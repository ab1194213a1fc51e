"""Weights: named copies of a trainable's trained parameters (reference, old policy, average)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.interfaces import Trainable
from reasonrl.recipe import AVERAGE
from reasonrl.sharding import local


class Weights:
    """Copies of the trained parameters by name, swapped in place; for LoRA they are tiny.

    Of parameters that are split over ranks, each rank holds and swaps its own part.

    `shadows` maps a name to decay(step): after each step copy = decay × copy + (1 − decay) × live. A decay of 1
    keeps the starting weights (a reference), 0 follows each step.
    """

    def __init__(self, trainable: Trainable, shadows: Mapping[str, Callable[[int], float]]) -> None:
        self.live = [p for p in trainable.module.parameters() if p.requires_grad]
        coarse = sorted({str(p.dtype) for p in self.live if p.dtype in (torch.bfloat16, torch.float16)})
        if AVERAGE in shadows and coarse:
            raise ConfigError(
                f"average needs trained parameters of float32, {type(trainable).__name__} trains {', '.join(coarse)}:"
                " small moves would be rounded away; train adapters (LoRA) or in float32"
            )
        self.decays = dict(shadows)
        self.copies: dict[str, list[Tensor]] = {name: [p.detach().clone() for p in self.live] for name in shadows}

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside, the module holds the named weights, without gradient; swapped back on the way out."""
        copies = self.copies[name]
        self._swap(copies)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(copies)

    def update(self, step: int) -> None:
        """Moves every copy towards the live weights by its decay."""
        for name, copies in self.copies.items():
            decay = self.decays[name](step)
            if decay < 1:
                with torch.no_grad():
                    torch._foreach_lerp_([local(c) for c in copies], [local(p) for p in self.live], 1 - decay)

    def _swap(self, copies: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, copy in zip(self.live, copies, strict=True):
                mine, other = local(parameter), local(copy)
                held = mine.clone()
                mine.copy_(other)
                other.copy_(held)


@contextmanager
def averaged(weights: Iterable[Weights]) -> Iterator[None]:
    """Inside, every module that learns holds its average (`Recipe.average`), where it keeps one."""
    with ExitStack() as stack:
        for each in weights:
            if AVERAGE in each.copies:
                stack.enter_context(each.use(AVERAGE))
        yield
