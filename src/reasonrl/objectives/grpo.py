"""GRPO: advantages relative to the group, a clipped surrogate, and k3 to the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

from attrs import field, frozen, validators
from torch import Tensor

from reasonrl.interfaces import Objective
from reasonrl.kernels import group_advantages, policy_loss
from reasonrl.types import Loss, Replay, Rewards, Stage


def _keep(step: int) -> float:
    return 1.0


@final
@frozen
class GRPO(Objective):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4).

    The loss of a stage is a mean over its own trained actions, so 64 image tokens do not drown 30 reasoning
    tokens: each stage weighs the same.
    """

    clip: float = field(default=0.2, validator=validators.gt(0))
    """ρ is clipped below 1 − clip, and above 1 + clip unless `clip_high` says otherwise."""
    clip_high: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    kl: float = field(default=0.0, validator=validators.ge(0))
    """Weight of k3 to the starting weights; 0 keeps no reference in memory."""
    most_importance: float = field(default=2.0, validator=validators.gt(0))
    """C of the weight min(π/β, C) of an action that was drawn from β and not from the π that is trained (truncated
    importance sampling); where replay returns what was drawn from, every weight is 1."""
    scale: Literal["std", "none"] = field(default="std", validator=validators.in_(("std", "none")))
    """Divide advantages by the group's standard deviation, or not (Dr. GRPO)."""
    eps: float = field(default=1e-4, validator=validators.gt(0))
    """Added to the standard deviation; rewards are in [0, 1] by convention."""

    @property
    def needs(self) -> frozenset[str]:
        """Log-probs to learn from, entropy to watch."""
        return frozenset({"log_probs", "entropy"})

    @property
    def shadows(self) -> Mapping[str, Callable[[int], float]]:
        """The reference, where the KL weight is above 0."""
        return {"reference": _keep} if self.kl else {}

    @property
    def smallest_group(self) -> int:
        """Two: a group of one has no baseline."""
        return 2

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns (r − mean) / (std + eps) within each group; incomplete draws take no part."""
        return group_advantages(rewards.total, rewards.groups, rewards.complete, scale=self.scale, eps=self.eps)

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the clipped surrogate plus kl × k3, summed over trained actions."""
        assert replay.log_probs is not None
        assert replay.entropy is not None
        live = replay.log_probs
        high = self.clip if self.clip_high is None else self.clip_high
        weights = self._importance(stage)
        found = policy_loss(
            live,
            live if stage.log_probs is None else stage.log_probs,
            # A factor above 0 passes through the surrogate's minimum.
            stage.advantages if weights is None else stage.advantages[:, None] * weights,
            stage.mask,
            reference_log_prob=frozen["reference"].log_probs if self.kl else None,
            clip=(self.clip, high),
            kl_coef=self.kl,
            agg="const",  # a sum: the loop divides by the step's count
        )
        metrics = {
            "surrogate": found.metrics["surrogate"],
            "clip_frac": found.metrics["clip_low"] + found.metrics["clip_high"],
            "ratio": found.metrics["ratio"],
            "entropy": replay.entropy.detach()[stage.mask].sum(),
        }
        if self.kl:
            metrics["kl"] = found.metrics["kl"]
        if weights is not None:
            metrics["importance"] = weights[stage.mask].sum()
            metrics["truncated_frac"] = (weights[stage.mask] >= self.most_importance).float().sum()
        return Loss(found.loss, metrics)

    def _importance(self, stage: Stage) -> Tensor | None:
        if stage.behaviour is None or stage.log_probs is None:
            return None
        return (stage.log_probs - stage.behaviour).exp().clamp(max=self.most_importance)
