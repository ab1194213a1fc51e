"""Advantage-weighted regression: the pretraining loss on drawn latents, each weighted by how good it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

from attrs import field, frozen, validators
from torch import Tensor

from reasonrl.interfaces import Objective
from reasonrl.kernels import group_advantages
from reasonrl.objectives.noised import (
    TARGET,
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


@final
@frozen
class AdvantageWeighted(Objective):
    """Flow matching on the policy's own draws, weighted by their advantage; no likelihood, any sampler.

    The loss of an action is w × mean |v(x_t, t) − (ε − x0)|², with w by `form`:

    - "exponential": w = min(exp(A/τ), most), advantage-weighted regression (AWR, arXiv 1910.00177) with its clipped
      weights. Weights are positive: every draw is still learnt, and one step cannot run away.
    - "linear": w = A, Advantage Weighted Matching (arXiv 2509.25050) at ratio 1, where its clip does nothing; that is
      what it is with one update on each draw, and uniform weights of time. A draw below its group's mean is pushed
      away without bound: give `kl` a weight.
    """

    form: Literal["exponential", "linear"] = field(
        default="exponential", validator=validators.in_(("exponential", "linear"))
    )
    temperature: float = field(default=1.0, validator=validators.gt(0))
    """τ of the exponential form: the smaller, the more the best draws count."""
    most: float = field(default=20.0, validator=validators.gt(0))
    """Largest |w|."""
    kl: float = field(default=0.0, validator=validators.ge(0))
    """Weight of the mean |v − v_reference|²; 0 keeps no reference in memory."""
    scale: Literal["std", "batch_std", "none"] = field(
        default="std", validator=validators.in_(("std", "batch_std", "none"))
    )
    """Divide advantages by the group's standard deviation, by that of the step, or not."""
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
        """The reference, where its weight is above 0."""
        return {"reference": keep} if self.kl else {}

    @property
    def smallest_group(self) -> int:
        """Two: a group of one has no baseline."""
        return 2

    def prepare(self, stage: Stage) -> Stage:
        """Adds one noised point a trained action."""
        return with_points(stage, times=self.times, shift=self.shift)

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns rewards less their group's mean, scaled; incomplete draws take no part."""
        return group_advantages(rewards.total, rewards.groups, rewards.complete, scale=self.scale, eps=self.eps)

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the weighted regression, summed over trained actions."""
        live = velocity(replay, stage)
        errors = (live - trained(stage, TARGET)).square().mean(1)
        weights = per_action(self.weights(stage.advantages), stage.mask)
        total = (weights * errors).sum()
        metrics = {"error": errors.detach().sum(), "weight": weights.sum()}
        if self.kl:
            distance = (live - velocity(frozen["reference"], stage)).square().mean(1).sum()
            total = total + self.kl * distance
            metrics["kl"] = distance.detach()
        return Loss(total, metrics)

    def weights(self, advantages: Tensor) -> Tensor:
        """Returns w of these advantages."""
        if self.form == "linear":
            return advantages.clamp(-self.most, self.most)
        return (advantages / self.temperature).exp().clamp(max=self.most)
