"""The mathematics of the hot path in plain torch: the specification every faster backend is tested against."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor


@frozen(eq=False)
class LogProbs:
    """Log-probability and, if asked for, entropy of each position, both float32 nats."""

    log_prob: Tensor
    entropy: Tensor | None = None


def guided_logits(logits: Tensor, uncond_logits: Tensor | None, cfg_weight: float) -> Tensor:
    """Returns float logits under classifier-free guidance, u + w (c − u) (GoT-R1's inference code).

    w = 1 is the conditional branch, w = 0 the unconditional one. A token that a branch masks (−inf) stays masked.
    """
    if uncond_logits is None or cfg_weight == 1.0:
        return logits.float() if logits.dtype != torch.float64 else logits
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    high, low = logits.to(wide), uncond_logits.to(wide)
    # −inf − −inf is nan where the meaning is "never".
    return torch.where(high.isneginf() | low.isneginf(), -torch.inf, low + cfg_weight * (high - low))


def log_softmax(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Returns (..., V) log-probs of the distribution tokens are drawn from: guided, then tempered."""
    return torch.log_softmax(guided_logits(logits, uncond_logits, cfg_weight) / temperature, dim=-1)


def selective_log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_weight: float = 1.0,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> LogProbs:
    """Returns the log-prob of each target (...) under logits (..., V), and the entropy without gradient."""
    every = log_softmax(logits, uncond_logits=uncond_logits, cfg_weight=cfg_weight, temperature=temperature)
    chosen = every.gather(-1, target[..., None]).squeeze(-1)
    return LogProbs(chosen, _entropy(every.detach()) if return_entropy else None)


def _entropy(log_probs: Tensor) -> Tensor:
    # exp(-inf) * -inf is nan where the limit is 0.
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scored: Tensor,
    *,
    scale: str = "std",
    eps: float = 1e-4,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Returns (M,) advantages A_i = (r_i − mean) / (std + eps) within each group, and who takes part.

    DeepSeekMath (arXiv 2402.03300) section 4.1; the standard deviation has ddof 1 as in TRL.
    `scale="none"` leaves out the division (Dr. GRPO, arXiv 2503.20783). Unscored rows get 0 and do not move the
    baseline. A group whose rewards differ by no more than `tolerance` × max(1, |r|) says nothing: rounding
    noise must not become a full-size gradient. A group with fewer than two scored rows takes no part.
    """
    wide = torch.where(scored, rewards.double(), 0.0)
    _, index = groups.unique(return_inverse=True)
    num_groups = int(index.max()) + 1 if len(index) else 0
    number = _sum_by(scored.double(), index, num_groups)
    mean = _sum_by(wide, index, num_groups) / number.clamp(min=1)
    gap = torch.where(scored, wide - mean[index], 0.0)
    spread = (_sum_by(gap.square(), index, num_groups) / (number - 1).clamp(min=1)).sqrt()
    largest = torch.zeros_like(mean).scatter_reduce_(0, index, wide.abs(), "amax")
    widest = torch.zeros_like(mean).scatter_reduce_(0, index, gap.abs(), "amax")
    flat = widest <= tolerance * largest.clamp(min=1)
    divisor = spread + eps if scale == "std" else torch.ones_like(spread)
    advantages = torch.where(flat[index], 0.0, gap / divisor[index])
    return advantages.float(), scored & (number[index] >= 2)


def _sum_by(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add_(0, index, values)


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """Returns Schulman's k3 estimate of KL(current ‖ reference) a token: exp(d) − d − 1, d = ref − current; >= 0."""
    gap = reference - log_prob
    return gap.exp() - gap - 1


def clipped_surrogate(
    log_prob: Tensor, old: Tensor, advantages: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Returns PPO's per-action −min(ρA, clip(ρ, 1−low, 1+high)A) (arXiv 1707.06347 eq. 7), and where it clipped."""
    ratio = (log_prob - old).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain
