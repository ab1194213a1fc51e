"""Policy loss and group advantages in Triton: one launch each instead of fifty, the same numbers. Imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.backend import on_device_of

KINDS = {"k1": 1, "k2": 2, "k3": 3}
NUM_SUMS = 5
"""Per sequence: surrogate, ratio, clip_low, clip_high, kl."""


@triton.jit
def _policy(
    log_prob_ptr, old_ptr, advantage_ptr, mask_ptr, reference_ptr, entropy_ptr, loss_ptr, slope_ptr, sums_ptr,
    num_tokens, low, high, dual, kl_coef, entropy_coef,
    SEQUENCE: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr, TRAINS_KL: tl.constexpr, ENTROPY: tl.constexpr,
    TOKEN_ADVANTAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * num_tokens
    mean_gap = 0.0
    if SEQUENCE:
        total = tl.full((), 0.0, tl.float32)
        number = tl.full((), 0.0, tl.float32)
        for start in range(0, num_tokens, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < num_tokens
            kept = tl.load(mask_ptr + base + cols, mask=inside, other=0) != 0
            live = tl.load(log_prob_ptr + base + cols, mask=inside, other=0.0)
            old = tl.load(old_ptr + base + cols, mask=inside, other=0.0)
            total += tl.sum(tl.where(kept, live - old, 0.0), 0)
            number += tl.sum(tl.where(kept, 1.0, 0.0), 0)
        mean_gap = total / tl.maximum(number, 1.0)
    sum_surrogate = tl.full((), 0.0, tl.float32)
    sum_ratio = tl.full((), 0.0, tl.float32)
    sum_low = tl.full((), 0.0, tl.float32)
    sum_high = tl.full((), 0.0, tl.float32)
    sum_kl = tl.full((), 0.0, tl.float32)
    for start in range(0, num_tokens, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < num_tokens
        kept = tl.load(mask_ptr + base + cols, mask=inside, other=0) != 0
        live = tl.load(log_prob_ptr + base + cols, mask=inside, other=0.0)
        old = tl.load(old_ptr + base + cols, mask=inside, other=0.0)
        if TOKEN_ADVANTAGE:
            a = tl.load(advantage_ptr + base + cols, mask=inside, other=0.0)
        else:
            a = tl.zeros((BLOCK,), tl.float32) + tl.load(advantage_ptr + row)
        gap = tl.where(kept, live - old, 0.0)
        if SEQUENCE:
            gap = gap * 0.0 + mean_gap
        in_range = (gap >= -20.0) & (gap <= 20.0)
        # minimum and maximum drop a nan; it is what a target outside the vocabulary looks like.
        rho = tl.where(gap == gap, tl.exp(tl.minimum(tl.maximum(gap, -20.0), 20.0)), gap)
        plain = rho * a
        bounded = tl.minimum(tl.maximum(rho, 1.0 - low), 1.0 + high) * a
        clipped = bounded < plain
        surrogate = tl.where(plain == plain, -tl.minimum(plain, bounded), plain)
        if DUAL:
            ceiling = -dual * a
            capped = (a < 0.0) & (surrogate > ceiling)
            surrogate = tl.where(capped, ceiling, surrogate)
            clipped = clipped | capped
        slope = tl.where(clipped, 0.0, tl.where(in_range, -plain, 0.0))
        loss = surrogate
        if KL > 0:
            d = tl.where(kept, tl.load(reference_ptr + base + cols, mask=inside, other=0.0) - live, 0.0)
            if KL == 1:
                kl = -d
                kl_slope = tl.zeros((BLOCK,), tl.float32) + 1.0
            elif KL == 2:
                kl = d * d * 0.5
                kl_slope = -d
            else:
                small = tl.abs(d) < 0.03
                grown = tl.exp(d)
                series = d * d * (0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d / 120.0)))
                kl = tl.where(small, series, grown - d - 1.0)
                slope_series = -d * (1.0 + d * (0.5 + d * (1.0 / 6.0 + d / 24.0)))
                kl_slope = tl.where(small, slope_series, 1.0 - grown)
            if TRAINS_KL:  # 0 × inf is nan
                loss += kl_coef * kl
                slope += kl_coef * kl_slope
            sum_kl += tl.sum(tl.where(kept, kl, 0.0), 0)
        if ENTROPY:
            loss -= entropy_coef * tl.load(entropy_ptr + base + cols, mask=inside, other=0.0)
        sum_surrogate += tl.sum(tl.where(kept, surrogate, 0.0), 0)
        sum_ratio += tl.sum(tl.where(kept, rho, 0.0), 0)
        sum_low += tl.sum(tl.where(kept & clipped & (a < 0.0), 1.0, 0.0), 0)
        sum_high += tl.sum(tl.where(kept & clipped & (a > 0.0), 1.0, 0.0), 0)
        tl.store(loss_ptr + base + cols, tl.where(kept, loss, 0.0), mask=inside)
        tl.store(slope_ptr + base + cols, tl.where(kept, slope, 0.0), mask=inside)
    tl.store(sums_ptr + row * 5, sum_surrogate)
    tl.store(sums_ptr + row * 5 + 1, sum_ratio)
    tl.store(sums_ptr + row * 5 + 2, sum_low)
    tl.store(sums_ptr + row * 5 + 3, sum_high)
    tl.store(sums_ptr + row * 5 + 4, sum_kl)


def policy_terms(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Tensor | None,
    entropy: Tensor | None,
    low: float,
    high: float,
    dual: float | None,
    kl_coef: float,
    kl: str,
    entropy_coef: float,
    sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (N, T) loss, its slope in log_prob, and (N, 5) sums; all inputs float32 and contiguous."""
    num_rows, num_tokens = log_prob.shape
    loss, slope = torch.zeros_like(log_prob), torch.zeros_like(log_prob)
    sums = log_prob.new_zeros(num_rows, NUM_SUMS)
    if log_prob.numel() == 0:
        return loss, slope, sums
    with on_device_of(log_prob):
        _policy[(num_rows,)](
            log_prob, old, advantages, mask.to(torch.uint8),
            log_prob if reference is None else reference, log_prob if entropy is None else entropy,
            loss, slope, sums, num_tokens, low, high, 0.0 if dual is None else dual, kl_coef, entropy_coef,
            SEQUENCE=sequence, DUAL=dual is not None, KL=0 if reference is None else KINDS[kl],
            TRAINS_KL=kl_coef != 0,
            ENTROPY=entropy is not None, TOKEN_ADVANTAGE=advantages.dim() == 2,
            BLOCK=min(1024, triton.next_power_of_2(num_tokens)), num_warps=4,
        )  # fmt: skip
    return loss, slope, sums


@triton.jit
def _advantages(
    reward_ptr, scored_ptr, order_ptr, start_ptr, batch_ptr, advantage_ptr, counted_ptr, ddof, eps, tolerance,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    first = tl.load(start_ptr + group)
    last = tl.load(start_ptr + group + 1)
    number = tl.full((), 0.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    largest = tl.full((), 0.0, tl.float64)
    for at in range(first, last, BLOCK):
        place = at + tl.arange(0, BLOCK)
        rows = tl.load(order_ptr + place, mask=place < last, other=0)
        kept = (tl.load(scored_ptr + rows, mask=place < last, other=0) != 0) & (place < last)
        r = tl.where(kept, tl.load(reward_ptr + rows, mask=place < last, other=0.0), 0.0)
        number += tl.sum(tl.where(kept, 1.0, 0.0).to(tl.float64), 0)
        total += tl.sum(r, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(r), 0))
    mean = total / tl.maximum(number, 1.0)
    squares = tl.full((), 0.0, tl.float64)
    widest = tl.full((), 0.0, tl.float64)
    for at in range(first, last, BLOCK):
        place = at + tl.arange(0, BLOCK)
        rows = tl.load(order_ptr + place, mask=place < last, other=0)
        kept = (tl.load(scored_ptr + rows, mask=place < last, other=0) != 0) & (place < last)
        # Centred before squaring: E[r²] − E[r]² loses everything where the mean is large.
        gap = tl.where(kept, tl.load(reward_ptr + rows, mask=place < last, other=0.0) - mean, 0.0)
        squares += tl.sum(gap * gap, 0)
        widest = tl.maximum(widest, tl.max(tl.abs(gap), 0))
    flat = widest <= tolerance * tl.maximum(largest, 1.0)
    divisor = tl.full((), 1.0, tl.float64)
    if SCALE == 1:
        divisor = tl.sqrt(squares / tl.maximum(number - ddof, 1.0)) + eps
    if SCALE == 2:
        divisor = tl.load(batch_ptr) + eps
    stretch = tl.full((), 1.0, tl.float64)
    if BASELINE == 1:
        stretch = number / tl.maximum(number - 1.0, 1.0)
    enough = number >= 2.0
    if BASELINE == 2:
        enough = number >= 1.0
    for at in range(first, last, BLOCK):
        place = at + tl.arange(0, BLOCK)
        rows = tl.load(order_ptr + place, mask=place < last, other=0)
        kept = (tl.load(scored_ptr + rows, mask=place < last, other=0) != 0) & (place < last)
        r = tl.load(reward_ptr + rows, mask=place < last, other=0.0)
        if BASELINE == 2:
            found = tl.where(kept, r / divisor, 0.0)
            if SCALE == 1:  # a deviation of nothing is no scale
                found = tl.where(flat, 0.0, found)
        else:
            found = tl.where(kept, tl.where(flat, 0.0, (r - mean) * stretch / divisor), 0.0)
        tl.store(advantage_ptr + rows, found.to(tl.float32), mask=place < last)
        counted = tl.where(kept, tl.where(enough, 1, 0), 0)
        tl.store(counted_ptr + rows, counted.to(tl.uint8), mask=place < last)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scored: Tensor,
    *,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Returns what `reference.group_advantages` returns: one program a group, float64 inside, centred sums."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    order = index.argsort(stable=True)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    wide = torch.where(scored, rewards.double(), 0.0)
    number = scored.sum()
    overall = torch.where(scored, wide - wide.sum() / number.clamp(min=1), 0.0)
    batch = (overall.square().sum() / (number - ddof).clamp(min=1)).sqrt()
    out = torch.zeros(len(rewards), dtype=torch.float32, device=rewards.device)
    counted = torch.zeros(len(rewards), dtype=torch.uint8, device=rewards.device)
    if len(rewards):
        with on_device_of(rewards):
            _advantages[(len(sizes),)](
                wide, scored.to(torch.uint8), order, starts, batch, out, counted, ddof, eps, tolerance,
                BASELINE=("mean", "loo", "none").index(baseline), SCALE=("none", "std", "batch_std").index(scale),
                BLOCK=32, num_warps=1,
            )  # fmt: skip
    return out, counted.bool()
