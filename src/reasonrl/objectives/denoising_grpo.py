"""DenoisingGRPO: GRPO whose actions are denoising steps, and whose KL has a closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final, get_args

from attrs import field, frozen, validators
from torch import Tensor

from reasonrl.batch import spread
from reasonrl.errors import ContractError
from reasonrl.gaussian import Reduce, guard_log_ratio, kl_means, kl_velocities, log_ratio
from reasonrl.interfaces import Objective
from reasonrl.kernels import group_advantages, policy_loss
from reasonrl.objectives.noised import keep
from reasonrl.types import Loss, Replay, Rewards, Stage

Ratio = Literal["likelihood", "means", "guard"]
Distance = Literal["means", "means_over_g", "velocities"]
NEEDED = {
    "likelihood": {"log_probs"},
    "means": {"mean", "std", "drawn_mean"},
    "guard": {"mean", "std", "drawn_mean"},
}
"""What a ratio is computed from."""
NEEDED_BY_KL = {"means": {"mean", "std"}, "means_over_g": {"mean", "std", "step_size"}, "velocities": {"step_velocity"}}
"""What a distance to the reference is computed from."""


@final
@frozen
class DenoisingGRPO(Objective):
    """GRPO over denoising steps (Flow-GRPO, arXiv 2505.05470, section 4.1; DanceGRPO, arXiv 2505.07818).

    A step draws x' from N(mean, std²), and only the mean is the model's. The loss of an action is
    -min(ρ A, clip(ρ, 1 - clip, 1 + clip_high) A) + kl × distance to the starting weights: every trained step of a
    picture has the picture's advantage.

    What a trainable replays, beside log-probs, in `Replay.extras`: "mean", "step_velocity" and "drawn_mean" (N, T, ...)
    as the actions are, "std" and "step_size" = s - s' (N, T). Only those that the fields ask for are needed.
    """

    clip: float = field(default=1e-4, validator=validators.gt(0))
    """ρ is clipped below 1 - clip, and above 1 + clip unless `clip_high` says otherwise. It goes with `reduce`:
    "mean": 1e-4 (Flow-GRPO, DDPO), 1e-5 (Flow-GRPO-Fast). "sum": what it means for tokens, e.g. 0.2, for a log-ratio
    is D times as large, D numbers a latent: c there allows what c / D allows here. With ratio="guard" a log-ratio
    is about std times as large as the raw one, and so is a clip range that bounds the same."""
    clip_high: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    ratio: Ratio = field(default="likelihood", validator=validators.in_(get_args(Ratio)))
    """likelihood: exp(log-prob - log-prob as drawn). means: the same from the two means, where nothing large cancels:
    for reduce="sum". guard: GRPO-Guard's corrected ratio (RatioNorm, arXiv 2510.22319), centred on 1 and alike at all
    noise levels; its second part, a step's loss over s - s', is not in it. The last two need means as drawn, which a
    renderer keeps when told to."""
    kl: float = field(default=0.0, validator=validators.ge(0))
    """Weight of the distance to the starting weights (Flow-GRPO: 0.04, or 0.01 for preference scores, with
    kl_on="means_over_g"); 0 keeps no reference in memory."""
    kl_on: Distance = field(default="means", validator=validators.in_(get_args(Distance)))
    """means: the KL of a step, (mean - reference)² / (2 std²). means_over_g: times s - s', as Flow-GRPO's program has
    it, which leaves g² in the place of std². velocities: (v - v_reference)², every step alike (DanceGRPO's peers)."""
    reduce: Reduce = field(default="mean", validator=validators.in_(get_args(Reduce)))
    """How a latent's D numbers become one: must be what the renderer's log-probs have, "mean" for every published
    program. It is used for ratios from means and for the distance."""
    most: float = field(default=5.0, validator=validators.gt(0))
    """Advantages beyond ±most count as ±most (Flow-GRPO: 5)."""
    scale: Literal["std", "batch_std", "none"] = field(
        default="std", validator=validators.in_(("std", "batch_std", "none"))
    )
    """Divide advantages by the group's standard deviation, by that of the step (Flow-GRPO's global_std), or not."""
    eps: float = field(default=1e-4, validator=validators.gt(0))
    """Added to the standard deviation; rewards are in [0, 1] by convention."""

    @property
    def needs(self) -> frozenset[str]:
        """What the ratio is computed from, and the distance where it has a weight."""
        return frozenset(NEEDED[self.ratio] | (NEEDED_BY_KL[self.kl_on] if self.kl else set()))

    @property
    def shadows(self) -> Mapping[str, Callable[[int], float]]:
        """The reference, where the KL weight is above 0."""
        return {"reference": keep} if self.kl else {}

    @property
    def smallest_group(self) -> int:
        """Two: a group of one has no baseline."""
        return 2

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns rewards less their group's mean, scaled and bounded; incomplete draws take no part."""
        found, takes_part = group_advantages(
            rewards.total, rewards.groups, rewards.complete, scale=self.scale, eps=self.eps
        )
        return found.clamp(-self.most, self.most), takes_part

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns the clipped surrogate plus kl × distance, summed over trained steps."""
        log_rho = self._log_ratios(stage, replay)
        found = policy_loss(
            log_rho,
            log_rho.new_zeros(log_rho.shape),
            stage.advantages,
            stage.mask,
            clip=(self.clip, self.clip if self.clip_high is None else self.clip_high),
            agg="const",  # a sum: the loop divides by the step's count
        )
        moved = log_rho.detach()[stage.mask]
        metrics = {
            "surrogate": found.metrics["surrogate"],
            "ratio": found.metrics["ratio"],
            "clip_low_frac": found.metrics["clip_low"],
            "clip_high_frac": found.metrics["clip_high"],
            "log_ratio": moved.sum(),
            "log_ratio_size": moved.abs().sum(),
        }
        total = found.loss
        if self.kl:
            distance = self._distances(stage, replay, frozen["reference"]).sum()
            total = total + self.kl * distance
            metrics["kl"] = distance.detach()
        return Loss(total, metrics)

    def _log_ratios(self, stage: Stage, replay: Replay) -> Tensor:
        """Returns (N, T) ln ρ, exact where the mask is True."""
        if self.ratio == "likelihood":
            if replay.log_probs is None or stage.log_probs is None:
                raise ContractError(
                    f"stage {stage.name!r} has no log-probs: its steps are deterministic, so draw them with a kernel"
                    " that has a density, or train without a likelihood (DiffusionNFT)"
                )
            return replay.log_probs - stage.log_probs
        measure = log_ratio if self.ratio == "means" else guard_log_ratio
        found = measure(
            _trained(replay, stage, "mean"),
            _trained(replay, stage, "drawn_mean"),
            _beside(replay, stage),
            stage.actions[stage.mask],
            reduce=self.reduce,
        )
        return spread(found, stage.mask)

    def _distances(self, stage: Stage, replay: Replay, reference: Replay) -> Tensor:
        """Returns (K,) distances from the reference at the K trained steps."""
        name = "step_velocity" if self.kl_on == "velocities" else "mean"
        live, other = _trained(replay, stage, name), _trained(reference, stage, name).detach()
        if self.kl_on == "velocities":
            return kl_velocities(live, other, reduce=self.reduce)
        size = replay.extras["step_size"][stage.mask] if self.kl_on == "means_over_g" else None
        return kl_means(live, other, _beside(replay, stage), step_size=size, reduce=self.reduce)


def _trained(replay: Replay, stage: Stage, name: str) -> Tensor:
    """Returns (K, ...) of what replay says beside each action, at the K trained ones."""
    found = replay.extras[name]
    if found.shape != stage.actions.shape:
        raise ContractError(
            f"replay of {stage.name!r} returned {name!r} of {tuple(found.shape)}, expected"
            f" {tuple(stage.actions.shape)}: one for each action"
        )
    return found[stage.mask]


def _beside(replay: Replay, stage: Stage) -> Tensor:
    """Returns (K, 1, ...) stds that multiply the K trained actions."""
    found = replay.extras["std"][stage.mask]
    return found.reshape(-1, *[1] * (stage.actions.ndim - 2))
