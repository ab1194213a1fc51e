"""The mathematics of the hot path in plain torch: the specification every faster backend is tested against.

Written for reading and for float64; it holds every logit, and autograd differentiates it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = Literal["std", "batch_std", "none"]
Baseline = Literal["mean", "loo", "none"]
Aggregate = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const"]
Divergence = Literal["k1", "k2", "k3"]
Ratio = Literal["token", "sequence"]
IGNORED = -100


class LogProbs(NamedTuple):  # a tuple, since torch.compile cannot trace a frozen attrs class
    """Log-probability, entropy if asked for, and log-sum-exp of each position, float32 nats; 0 where masked."""

    log_prob: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None
    """ln Σ exp(z / T); without gradient."""


def guided_logits(logits: Tensor, uncond_logits: Tensor | None, cfg_weight: float) -> Tensor:
    """Returns float logits under classifier-free guidance, u + w (c − u) (GoT-R1's inference code).

    w = 1 is the conditional branch, w = 0 the unconditional one. A token that a branch masks (−inf) stays masked.
    """
    wide = _wide(logits)
    if uncond_logits is None or cfg_weight == 1.0:
        return wide
    low = uncond_logits.to(wide.dtype)
    # −inf − −inf is nan where the meaning is "never".
    return torch.where(wide.isneginf() | low.isneginf(), -torch.inf, low + cfg_weight * (wide - low))


def log_softmax(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Returns (..., V) log-probs of the distribution tokens are drawn from: guided, then tempered."""
    heat = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(guided_logits(logits, uncond_logits, cfg_weight) / heat, dim=-1)


def selective_log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    return_entropy: bool = False,
) -> LogProbs:
    """Returns log-prob and entropy, both with gradient, of each target (...) under logits (..., V).

    Positions that `mask` leaves out, or whose target is `ignore_index`, are 0. A row whose every logit is −inf has
    log-prob −inf and entropy 0; a target outside the vocabulary has log-prob nan.
    """
    kept = target != ignore_index if mask is None else mask & (target != ignore_index)
    z = guided_logits(logits, uncond_logits, cfg_weight)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    dead = z.isneginf().all(-1)
    every = torch.log_softmax(torch.where((dead | ~kept)[..., None], 0.0, z), -1)
    inside = (target >= 0) & (target < z.shape[-1])
    chosen = every.gather(-1, torch.where(inside, target.long(), 0)[..., None]).squeeze(-1)
    chosen = torch.where(dead, -torch.inf, torch.where(inside, chosen, torch.nan))
    spread = torch.where(kept & ~dead, _entropy(every), 0.0) if return_entropy else None
    total = torch.where(kept, z.detach().logsumexp(-1), 0.0)
    return LogProbs(torch.where(kept, chosen, 0.0), spread, total)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float = 1.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    return_entropy: bool = False,
) -> LogProbs:
    """Returns `selective_log_prob` of the logits hidden Wᵀ + b (+ u Bᵀ), guided with two heads as the paper writes it.

    `low_rank` = (u, B) with u (..., r), B (V, r) adds to both branches.
    """

    def head(states: Tensor) -> Tensor:
        z = _wide(states) @ _wide(weight).T
        z = z if bias is None else z + bias.to(z.dtype)
        return z if low_rank is None else z + low_rank[0].to(z.dtype) @ low_rank[1].to(z.dtype).T

    return selective_log_prob(
        head(hidden),
        target,
        uncond_logits=None if uncond_hidden is None else head(uncond_hidden),
        cfg_weight=cfg_weight,
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
    )


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scored: Tensor,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Returns (M,) advantages A_i = (r_i − mean) / (std + eps) within each group, and who takes part.

    DeepSeekMath (arXiv 2402.03300) section 4.1; the standard deviation has ddof 1 as in TRL. `scale="none"` leaves
    out the division (Dr. GRPO, arXiv 2503.20783), "batch_std" divides by the deviation of all scored rewards
    (REINFORCE++). `baseline="loo"` compares with the mean of the others (RLOO, arXiv 2402.14740), "none" with 0.
    Unscored rows get 0 and do not move the baseline. A group whose rewards differ by no more than `tolerance` ×
    max(1, |r|) says nothing: rounding noise must not become a full-size gradient. With a baseline a group needs
    two scored rows to take part.
    """
    wide = torch.where(scored, rewards.double(), 0.0)
    _, index = groups.unique(return_inverse=True)
    num_groups = int(index.max()) + 1 if len(index) else 0
    number = _sum_by(scored.double(), index, num_groups)
    mean = _sum_by(wide, index, num_groups) / number.clamp(min=1)
    gap = torch.where(scored, wide - mean[index], 0.0)
    spread = (_sum_by(gap.square(), index, num_groups) / (number - ddof).clamp(min=1)).sqrt()
    largest = torch.zeros_like(mean).scatter_reduce_(0, index, wide.abs(), "amax")
    widest = torch.zeros_like(mean).scatter_reduce_(0, index, gap.abs(), "amax")
    flat = (widest <= tolerance * largest.clamp(min=1))[index]
    if scale == "batch_std":
        overall = wide.sum() / scored.sum().clamp(min=1)
        squares = torch.where(scored, wide - overall, 0.0).square().sum()
        spread = (squares / (scored.sum() - ddof).clamp(min=1)).sqrt().expand(num_groups)
    if baseline == "loo":
        gap = gap * (number / (number - 1).clamp(min=1))[index]
    elif baseline == "none":
        gap = wide
        flat = flat if scale == "std" else torch.zeros_like(flat)  # a deviation of nothing is no scale
    divisor = torch.ones_like(mean) if scale == "none" else spread + eps
    advantages = torch.where(flat | ~scored, 0.0, gap / divisor[index])
    enough = 1 if baseline == "none" else 2
    return advantages.float(), scored & (number[index] >= enough)


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """Returns Schulman's k3 estimate of KL(current ‖ reference) a token: exp(d) − d − 1, d = ref − current; >= 0."""
    gap = reference - log_prob
    # For small d the difference is all rounding noise: d²/2 + d³/6 + d⁴/24 + d⁵/120 is exact to float32 there.
    series = gap.square() * (0.5 + gap * (1 / 6 + gap * (1 / 24 + gap / 120)))
    return torch.where(gap.abs() < 0.03, series, gap.exp() - gap - 1)


def divergence(log_prob: Tensor, reference: Tensor, kind: Divergence) -> Tensor:
    """Returns the estimate k1 = −d, k2 = d²/2 or k3 of KL(current ‖ reference), d = ref − current (Schulman 2020)."""
    if kind == "k3":
        return k3(log_prob, reference)
    gap = reference - log_prob
    return -gap if kind == "k1" else gap.square() / 2


def masked_aggregate(values: Tensor, mask: Tensor, agg: Aggregate, denominator: float | Tensor | None = None) -> Tensor:
    """Returns one number of (N, T) values where `mask`; an empty mask gives 0 with gradient 0.

    token_mean: Σ / tokens (DAPO). seq_mean_token_mean: mean over sequences of their means (GRPO).
    seq_mean_token_sum: mean over sequences of their sums. const: Σ / 1 (Dr. GRPO divides by a constant). `denominator`
    replaces the outer count, of tokens or of sequences, e.g. by that of all ranks.
    """
    kept = torch.where(mask, values, 0.0)
    length = mask.sum(-1)
    if agg in ("token_mean", "const"):
        total = kept.sum()
        number = length.sum() if agg == "token_mean" else torch.ones_like(total)
    else:
        rows = kept.sum(-1)
        total = (rows / length.clamp(min=1) if agg == "seq_mean_token_mean" else rows).sum()
        number = (length > 0).sum()
    if denominator is not None:
        number = torch.as_tensor(denominator, device=values.device)
        return total / torch.where(number == 0, 1, number)
    return total / number.clamp(min=1)


def policy_terms(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: Divergence = "k3",
    entropy_coef: float = 0.0,
    ratio: Ratio = "token",
) -> dict[str, Tensor]:
    """Returns (N, T) loss, surrogate, ratio, clipped low, clipped high and kl of each action, 0 where masked.

    Surrogate: PPO eq. 7; `dual_clip` = c bounds it by −cA where A < 0 (arXiv 1912.09729 eq. 5). `ratio="sequence"`
    is GSPO's s_i = exp(mean_t ln ρ), with the gradient of the token carrying it (arXiv 2507.18071 eq. 14).
    Log-ratios are clamped to ±20: e²⁰ is already far outside any clip range.
    """
    gap = torch.where(mask, log_prob - old, 0.0)
    if ratio == "sequence":
        mean = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        live = torch.where(mask, log_prob, 0.0)
        gap = mean.detach() + live - live.detach()
    rho = gap.clamp(-20, 20).exp()
    weight = advantages[:, None].expand_as(rho) if advantages.dim() < rho.dim() else advantages
    low, high = clip
    plain, bounded = rho * weight, rho.clamp(1 - low, 1 + high) * weight
    surrogate = -torch.minimum(plain, bounded)
    clipped = (bounded < plain) & mask
    if dual_clip is not None:
        ceiling = -dual_clip * weight
        capped = (weight < 0) & (surrogate > ceiling)
        surrogate = torch.where(capped, ceiling, surrogate)
        clipped = clipped | (capped & mask)
    loss = surrogate
    terms = {"surrogate": surrogate, "ratio": rho.detach()}
    if reference is not None:
        terms["kl"] = divergence(torch.where(mask, log_prob, 0.0), torch.where(mask, reference, 0.0), kl)
        loss = loss + kl_coef * terms["kl"] if kl_coef else loss  # 0 × inf is nan
    if entropy is not None:
        loss = loss - entropy_coef * torch.where(mask, entropy, 0.0)
    terms |= {
        "loss": loss,
        "clip_low": (clipped & (weight < 0)).to(rho.dtype),
        "clip_high": (clipped & (weight > 0)).to(rho.dtype),
    }
    return {name: torch.where(mask, value, 0.0) for name, value in terms.items()}


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _entropy(log_probs: Tensor) -> Tensor:
    # p ln p is 0 where p is 0; as written it would be nan there, and so would its gradient.
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)


def _sum_by(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add_(0, index, values)
