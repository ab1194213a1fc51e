"""DiffusionNFT: rewards learnt on the forward process, without likelihoods and with any sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

from attrs import field, frozen, validators
from torch import Tensor

from reasonrl.interfaces import Objective
from reasonrl.kernels import group_advantages
from reasonrl.objectives.noised import (
    TARGET,
    TIMES,
    TIMES_VALIDATOR,
    VELOCITY,
    Times,
    keep,
    per_action,
    trained,
    velocity,
    with_points,
)
from reasonrl.types import Loss, Replay, Rewards, Stage

SMALLEST_WEIGHT = 1e-5
"""Floor of the mean error that normalises a squared error."""


@final
@frozen
class DiffusionNFT(Objective):
    """Diffusion Negative-aware FineTuning (arXiv 2509.16117, section 3; weights w as the authors' program).

    A drawn latent is noised again; the live velocity v is mixed with that of an old policy,
    v⁺ = β v + (1 − β) v_old and v⁻ = (1 + β) v_old − β v, and both say where the clean latent is, x0± = x_t − t v±.
    The loss of an action is A_max/β × [r |x0⁺ − x0|²/w⁺ + (1 − r) |x0⁻ − x0|²/w⁻], squares averaged over dimensions,
    with r = clip(A / 2A_max + ½, 0, 1) and w = max(mean |·|, 1e-5) without gradient. A_max makes its first-order
    slope in v at v_old that of −A × the regression loss; there a draw with advantage 0 has none.

    The old policy should also draw: `Recipe(sample_with={stage: "old"})`. What a trainable records and replays is in
    `objectives.noised`.
    """

    beta: float = field(default=1.0, validator=validators.gt(0))
    """β, how far v⁺ goes from the old velocity to the live one."""
    most: float = field(default=5.0, validator=validators.gt(0))
    """A_max: advantages beyond ±A_max count as ±A_max."""
    kl: float = field(default=0.0, validator=validators.ge(0))
    """Weight of the mean |v − v_reference|² (the authors: 1e-4); 0 keeps no reference in memory."""
    decay_rate: float = field(default=0.001, validator=validators.ge(0))
    """The old policy's decay after step i (0-based) is min(decay_rate × i, decay_most)."""
    decay_most: float = field(default=0.5, validator=[validators.ge(0), validators.lt(1)])
    """0 makes the old policy that of the step's start."""
    scale: Literal["std", "batch_std", "none"] = field(
        default="std", validator=validators.in_(("std", "batch_std", "none"))
    )
    """Divide advantages by the group's standard deviation, by that of the step (the authors), or not."""
    eps: float = field(default=1e-4, validator=validators.gt(0))
    """Added to the standard deviation; rewards are in [0, 1] by convention."""
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
        """The old policy, and the reference where its weight is above 0."""
        return {"old": self.decay, **({"reference": keep} if self.kl else {})}

    @property
    def smallest_group(self) -> int:
        """Two: a group of one has no baseline."""
        return 2

    def decay(self, step: int) -> float:
        """Returns how much of the old policy is kept after this step (0-based)."""
        return min(self.decay_rate * step, self.decay_most)

    def prepare(self, stage: Stage) -> Stage:
        """Adds one noised point a trained action."""
        return with_points(stage, times=self.times, shift=self.shift)

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns rewards less their group's mean, scaled; incomplete draws take no part."""
        return group_advantages(rewards.total, rewards.groups, rewards.complete, scale=self.scale, eps=self.eps)

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the weighted regression to both sides of the old policy, summed over trained actions."""
        live, old = velocity(replay, stage), velocity(frozen["old"], stage)
        t, target = trained(stage, TIMES)[:, None], trained(stage, TARGET)
        optimality = per_action((stage.advantages / (2 * self.most) + 0.5).clamp(0, 1), stage.mask)
        # x0± − x0 = x_t − t v± − x0 = t (ε − x0 − v±): without the cancellation of large numbers.
        positive = _normalised(t * (target - (self.beta * live + (1 - self.beta) * old)))
        negative = _normalised(t * (target - ((1 + self.beta) * old - self.beta * live)))
        total = self.most / self.beta * (optimality * positive + (1 - optimality) * negative).sum()
        metrics = {
            "positive": positive.detach().sum(),
            "negative": negative.detach().sum(),
            "from_old": (live.detach() - old).square().mean(1).sum(),
        }
        if self.kl:
            distance = (live - velocity(frozen["reference"], stage)).square().mean(1).sum()
            total = total + self.kl * distance
            metrics["kl"] = distance.detach()
        return Loss(total, metrics)


def _normalised(error: Tensor) -> Tensor:
    """Returns (K,) mean squares of (K, D) errors, each divided by its mean absolute error, which has no gradient."""
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=SMALLEST_WEIGHT)
