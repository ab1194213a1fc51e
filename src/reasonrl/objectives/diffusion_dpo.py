"""Diffusion-DPO: the better of two draws of a group should be the one that is explained better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import logsigmoid

from reasonrl.interfaces import Objective
from reasonrl.objectives.noised import (
    TARGET,
    TIMES_VALIDATOR,
    VELOCITY,
    Times,
    keep,
    trained,
    velocity,
    with_points,
)
from reasonrl.types import Loss, Replay, Rewards, Stage


@final
@frozen
class DiffusionDPO(Objective):
    """Direct preference optimization of diffusion models (arXiv 2311.12908), on pairs within a group.

    With e = mean |v − (ε − x0)|² the loss of a pair at a point is
    −log σ(−β/2 × [(e − e_reference) of the better − (e − e_reference) of the worse]): log 2 at the reference.
    β/2, on errors averaged over dimensions, stands for the paper's β T ω, as in the authors' program. As there, a
    group shares its times and its noise. Each trained action bears the mean of its pairs, so that the loop's division
    by their number gives a mean over pairs.
    """

    beta: float = field(default=2000.0, validator=validators.gt(0))
    """β: how dearly leaving the reference is bought; the authors chose 2000 (SD 1.5) and 5000 (SDXL)."""
    pairs: Literal["extremes", "all"] = field(default="extremes", validator=validators.in_(("extremes", "all")))
    """The best of a group against its worst, or every two draws of different reward."""
    tolerance: float = field(default=1e-6, validator=validators.ge(0))
    """Rewards of a group that differ by no more than this × max(1, |r|) are equal."""
    times: Times = field(default="uniform", validator=TIMES_VALIDATOR)
    """How t is drawn."""
    shift: float = field(default=1.0, validator=validators.gt(0))
    """Moves t to shift × t / (1 + (shift − 1) t)."""

    @property
    def needs(self) -> frozenset[str]:
        """A velocity at the noised points."""
        return frozenset({VELOCITY})

    @property
    def shadows(self) -> Mapping[str, Callable[[int], float]]:
        """The reference."""
        return {"reference": keep}

    @property
    def whole_groups(self) -> bool:
        """Pairs share a pass."""
        return True

    @property
    def smallest_group(self) -> int:
        """Two make a pair."""
        return 2

    def prepare(self, stage: Stage) -> Stage:
        """Adds one noised point a trained action, at times and with noise that its group shares."""
        return with_points(stage, times=self.times, shift=self.shift, shared=True)

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns who beats whom: a draw is better than another of its group where its number is larger.

        "all": (draws it beats − draws that beat it) / (draws of the group − 1), in [−1, 1]; "extremes": 1 for the
        best, −1 for the worst, several where they tie. A draw without a pair takes no part.
        """
        standing = torch.zeros_like(rewards.total)
        for group in rewards.groups.unique().tolist():
            rows = ((rewards.groups == group) & rewards.complete).nonzero().flatten()
            standing[rows] = self._standing(rewards.total[rows])
        return standing.float(), standing != 0 if self.pairs == "extremes" else self._paired(standing, rewards)

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the mean loss of its pairs, summed over trained actions."""
        target = trained(stage, TARGET)
        error = (velocity(replay, stage) - target).square().mean(1)
        gained = error - (velocity(frozen["reference"], stage) - target).square().mean(1)
        excess = gained.new_zeros(stage.mask.shape).masked_scatter(stage.mask, gained)
        ahead = (stage.advantages[:, None] > stage.advantages) & (stage.groups[:, None] == stage.groups)
        better, worse = ahead.nonzero(as_tuple=True)
        margins = -self.beta / 2 * (excess[better] - excess[worse])
        shares = _shares(stage.mask, better, worse).to(excess)
        total = -(shares * logsigmoid(margins)).sum()
        metrics = {
            "error": error.detach().sum(),
            "margin": (shares * margins.detach()).sum(),
            "accuracy": shares[margins > 0].sum(),
        }
        return Loss(total, metrics)

    def _standing(self, values: Tensor) -> Tensor:
        """Returns (G,) standings of one group's (G,) scored rewards."""
        if not len(values):
            return values
        level = _levels(values, self.tolerance)
        if self.pairs == "all":
            order = (level[:, None] - level).sign()
            return order.sum(1).double() / max(1, len(values) - 1)
        return (level == level.max()).double() - (level == level.min()).double()

    def _paired(self, standing: Tensor, rewards: Rewards) -> Tensor:
        """Returns (M,) bool: another draw of the group has another standing."""
        same = (rewards.groups[:, None] == rewards.groups) & rewards.complete
        return rewards.complete & (same & (standing[:, None] != standing)).any(1)


def _levels(values: Tensor, tolerance: float) -> Tensor:
    """Returns (G,) int64 ranks, 0 = the lowest; values that differ by rounding alone share one."""
    ordered, order = values.sort()
    close = tolerance * values.abs().max().clamp(min=1)
    rises = (ordered.diff(prepend=ordered[:1]) > close).cumsum(0)
    return torch.empty_like(rises).scatter(0, order, rises)


def _shares(mask: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """Returns (pairs, T): how much of a pair's loss its two actions bear together, each by its own number of pairs."""
    both = mask[better] & mask[worse]
    number = torch.zeros(mask.shape, device=mask.device, dtype=torch.float64)
    number.index_add_(0, better, both.double()).index_add_(0, worse, both.double())
    share = 1 / number.clamp(min=1)
    return both * (share[better] + share[worse])
