"""What happens to a block of logits, in torch: folded into each row's statistics, or turned into its gradient."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from reasonrl.kernels.reference import guided_logits

SKIP, OUTSIDE = -1, -2
"""Targets that mean: a row to leave out; a row whose target is no word (its log-prob is nan)."""
LEAST = -1e4
"""Stands for smaller (z − top) / T: its exponential is 0, and no product with it overflows, as finfo.min / T would."""


@frozen(eq=False)
class Guidance:
    """A second block of logits u, and w of u + w (c − u)."""

    uncond: Tensor
    weight: float


@frozen(eq=False)
class Statistics:
    """Running sums of N rows over the words seen so far; x = (z − top) / T."""

    top: Tensor
    """max z; −inf before any."""
    total: Tensor
    """Σ eˣ."""
    spread: Tensor
    """Σ eˣ x."""
    picked: Tensor
    """z of the target."""

    @classmethod
    def empty(cls, num_rows: int, like: Tensor) -> Statistics:
        """Returns those of no words, in float32, or float64 for a float64 model."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        made = torch.zeros(3, num_rows, dtype=dtype, device=like.device)
        return cls(made[0] - torch.inf, made[0], made[1], made[2] - torch.inf)

    def rows(self, start: int, stop: int) -> Statistics:
        """Returns views of some rows."""
        return Statistics(*(v[start:stop] for v in (self.top, self.total, self.spread, self.picked)))


@frozen(eq=False)
class Results:
    """A row's outputs, and what its backward needs: p = exp((z − top)/T − log_total)."""

    log_prob: Tensor
    entropy: Tensor
    top: Tensor
    log_total: Tensor


def fold(
    z: Tensor,
    target: Tensor,
    heat: Tensor,
    state: Statistics,
    *,
    first: int = 0,
    guidance: Guidance | None = None,
    bias: Tensor | None = None,
    entropy: bool,
) -> None:
    """Adds a block (R, C) of words first.. to the rows' statistics; heat (R,) is 1/T. Overwrites a float z."""
    z = _ready(z, state.top.dtype, guidance, bias)
    here = (target >= first) & (target < first + z.shape[1])
    found = z.gather(1, torch.where(here, target - first, 0)[:, None]).squeeze(1)
    state.picked.copy_(torch.where(here, found, state.picked))
    top = torch.maximum(state.top, z.amax(1))
    # A row with no finite logit yet: −inf − −inf is nan where the meaning is "nothing".
    safe = torch.where(top.isneginf(), 0.0, top)
    moved = torch.where(state.top.isneginf(), 0.0, (state.top - safe) * heat).clamp_(min=LEAST)
    shrink = torch.where(state.top.isneginf(), 0.0, moved.exp())
    z = z.sub_(safe[:, None]).mul_(heat[:, None])
    if entropy:
        exps = z.exp()
        spread = z.clamp_(min=LEAST).mul_(exps).sum(1)
        state.spread.copy_(shrink * (state.spread + moved * state.total) + spread)
    else:
        exps = z.exp_()
    state.total.copy_(shrink * state.total + exps.sum(1))
    state.top.copy_(top)


def finish(target: Tensor, heat: Tensor, state: Statistics) -> Results:
    """Returns log-probs and entropies; see `reference.selective_log_prob` for rows without an answer."""
    dead = state.total == 0
    safe = torch.where(state.top.isneginf(), 0.0, state.top)
    total = torch.where(dead, 1.0, state.total)
    log_total = total.log()
    log_prob = (state.picked - safe) * heat - log_total
    log_prob = torch.where(target == OUTSIDE, torch.nan, torch.where(dead, -torch.inf, log_prob))
    entropy = torch.where(dead, 0.0, log_total - state.spread / total)
    skipped = target == SKIP
    return Results(
        torch.where(skipped, 0.0, log_prob),
        torch.where(skipped, 0.0, entropy),
        state.top,
        torch.where(dead, -torch.inf, log_total),
    )


def gradient(
    z: Tensor,
    target: Tensor,
    heat: Tensor,
    found: Results,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    first: int = 0,
    guidance: Guidance | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns (R, C) dz_j = [g (1[j=y] − p_j) − gᴴ p_j (ln p_j + H)] / T, float; overwrites a float z."""
    z = _ready(z, found.top.dtype, guidance, bias)
    dead = found.log_total.isneginf()
    safe = torch.where(found.top.isneginf(), 0.0, found.top)
    z = z.sub_(safe[:, None]).mul_(heat[:, None]).sub_(torch.where(dead, 0.0, found.log_total)[:, None])
    live = (target != SKIP) & ~dead
    each = _live(grad_log_prob, live, heat)
    if grad_entropy is None:
        out = z.exp_().mul_(-each[:, None])
    else:
        of_entropy = _live(grad_entropy, live, heat)
        probs = z.exp()
        z.clamp_(min=LEAST).add_(found.entropy[:, None]).mul_(of_entropy[:, None])
        out = z.add_(each[:, None]).mul_(probs).neg_()
    out[~live] = 0.0  # 0 × nan is nan, and nobody asked about these rows
    here = (target >= first) & (target < first + z.shape[1])
    return out.scatter_add_(1, torch.where(here, target - first, 0)[:, None], torch.where(here, each, 0.0)[:, None])


def _live(grad: Tensor | None, live: Tensor, heat: Tensor) -> Tensor:
    return torch.zeros_like(heat) if grad is None else torch.where(live, grad * heat, 0.0)


def _ready(z: Tensor, dtype: torch.dtype, guidance: Guidance | None, bias: Tensor | None) -> Tensor:
    """Returns guided logits of the given precision that may be overwritten."""
    if guidance is not None:
        return guided_logits(z.to(dtype), guidance.uncond, guidance.weight)
    z = z.to(dtype)
    return z if bias is None else z.add_(bias.to(dtype))
