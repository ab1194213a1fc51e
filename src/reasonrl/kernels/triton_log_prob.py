"""`epilogue` in Triton: one read of the logits. No atomics: a row has one program, so results are deterministic.

Written so that the interpreter runs it too (bfloat16 is widened on load, no libdevice, no autotune). Imports triton:
only `backend` imports this, when a Triton backend is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.backend import on_device_of
from reasonrl.kernels.epilogue import Guidance, Results, Statistics

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(
    z_ptr, u_ptr, bias_ptr, target_ptr, heat_ptr, top_ptr, total_ptr, spread_ptr, picked_ptr,
    log_prob_ptr, entropy_ptr, last_top_ptr, log_total_ptr, first, num_cols, z_stride, u_stride, cfg_weight,
    GUIDED: tl.constexpr, BIASED: tl.constexpr, ENTROPY: tl.constexpr,
    FRESH: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == -1:  # SKIP
        if LAST:
            tl.store(log_prob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(last_top_ptr + row, 0.0)
            tl.store(log_total_ptr + row, 0.0)
        return
    heat = tl.load(heat_ptr + row)
    z_row = z_ptr + row * z_stride
    u_row = u_ptr + row * u_stride
    if FRESH:
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        spread = tl.full((), 0.0, tl.float32)
        picked = tl.full((), float("-inf"), tl.float32)
    else:
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        spread = tl.load(spread_ptr + row)
        picked = tl.load(picked_ptr + row)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < num_cols
        x = tl.load(z_row + cols, mask=inside, other=float("-inf")).to(tl.float32)
        if GUIDED:
            u = tl.load(u_row + cols, mask=inside, other=float("-inf")).to(tl.float32)
            masked = (x == float("-inf")) | (u == float("-inf"))
            x = tl.where(masked, float("-inf"), u + cfg_weight * (x - u))
        if BIASED:
            x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        moved = tl.where(top == float("-inf"), 0.0, tl.maximum((top - safe) * heat, -1e4))
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(moved * LOG2E))
        # Subtracted before it is scaled: a shift of all logits changes nothing.
        gap = (x - safe) * heat
        exps = tl.exp2(gap * LOG2E)
        if ENTROPY:
            each = tl.where(exps == 0.0, 0.0, exps * gap)
            spread = shrink * (spread + moved * total) + tl.sum(each, 0)
        total = shrink * total + tl.sum(exps, 0)
        top = new
    if (target >= first) & (target < first + num_cols):
        at = target - first
        picked = tl.load(z_row + at).to(tl.float32)
        if GUIDED:
            low = tl.load(u_row + at).to(tl.float32)
            masked_one = (picked == float("-inf")) | (low == float("-inf"))
            picked = tl.where(masked_one, float("-inf"), low + cfg_weight * (picked - low))
        if BIASED:
            picked += tl.load(bias_ptr + at).to(tl.float32)
    if LAST:
        tl.store(last_top_ptr + row, top)
        dead = total == 0.0
        whole = tl.where(dead, 1.0, total)
        log_total = tl.log(whole)
        safe = tl.where(top == float("-inf"), 0.0, top)
        log_prob = tl.where(dead, float("-inf"), (picked - safe) * heat - log_total)
        log_prob = tl.where(target == -2, float("nan"), log_prob)  # OUTSIDE
        tl.store(log_prob_ptr + row, log_prob)
        tl.store(entropy_ptr + row, tl.where(dead, 0.0, log_total - spread / whole))
        tl.store(log_total_ptr + row, tl.where(dead, float("-inf"), log_total))
    else:
        tl.store(top_ptr + row, top)
        tl.store(total_ptr + row, total)
        tl.store(spread_ptr + row, spread)
        tl.store(picked_ptr + row, picked)


@triton.jit
def _gradient(
    z_ptr, u_ptr, bias_ptr, target_ptr, heat_ptr, top_ptr, log_total_ptr, entropy_ptr, g_ptr, gh_ptr,
    out_ptr, out_u_ptr, first, num_cols, z_stride, u_stride, out_stride, out_u_stride, cfg_weight,
    GUIDED: tl.constexpr, BIASED: tl.constexpr, PROB: tl.constexpr, ENTROPY: tl.constexpr,
    UNCOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < num_cols
    target = tl.load(target_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    live = (target != -1) & (log_total != float("-inf"))
    heat = tl.load(heat_ptr + row)
    top = tl.load(top_ptr + row)
    x = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    if GUIDED:
        u = tl.load(u_ptr + row * u_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
        masked = (x == float("-inf")) | (u == float("-inf"))
        x = tl.where(masked, float("-inf"), u + cfg_weight * (x - u))
    if BIASED:
        x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    log_p = (x - tl.where(live, top, 0.0)) * heat - tl.where(live, log_total, 0.0)
    p = tl.exp2(log_p * LOG2E)
    d = tl.zeros((BLOCK,), tl.float32)
    if PROB:
        g = tl.load(g_ptr + row).to(tl.float32)
        # The label's 1 is added in float32, before rounding: 1 − p survives where p is near 1.
        d += g * (tl.where(cols + first == target, 1.0, 0.0) - p)
    if ENTROPY:
        gh = tl.load(gh_ptr + row).to(tl.float32)
        h = tl.load(entropy_ptr + row)
        d -= gh * tl.where(p > 0.0, p * (log_p + h), 0.0)
    d = tl.where(live, d * heat, 0.0)
    if GUIDED:
        tl.store(out_ptr + row * out_stride + cols, (cfg_weight * d).to(out_ptr.dtype.element_ty), mask=inside)
        if UNCOND:
            other = ((1.0 - cfg_weight) * d).to(out_u_ptr.dtype.element_ty)
            tl.store(out_u_ptr + row * out_u_stride + cols, other, mask=inside)
    else:
        tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=inside)


def fold(
    z: Tensor,
    target: Tensor,
    heat: Tensor,
    state: Statistics,
    results: Results,
    *,
    first: int,
    fresh: bool,
    last: bool,
    guidance: Guidance | None = None,
    bias: Tensor | None = None,
    entropy: bool,
) -> None:
    """Adds a block (R, C) to the statistics; the last block of a row writes its results."""
    if z.shape[0] == 0:
        return
    uncond, weight = (z, 1.0) if guidance is None else (guidance.uncond, guidance.weight)
    block, warps = _fold_block(z.shape[1])
    with on_device_of(z):
        _fold[(z.shape[0],)](
            z, uncond, z if bias is None else bias, target, heat,
            state.top, state.total, state.spread, state.picked,
            results.log_prob, results.entropy, results.top, results.log_total,
            first, z.shape[1], z.stride(0), uncond.stride(0), weight,
            GUIDED=guidance is not None, BIASED=bias is not None, ENTROPY=entropy,
            FRESH=fresh, LAST=last, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def gradient(
    z: Tensor,
    target: Tensor,
    heat: Tensor,
    found: Results,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    *,
    first: int = 0,
    guidance: Guidance | None = None,
    bias: Tensor | None = None,
    out_uncond: Tensor | None = None,
) -> None:
    """Writes dz, guided ones split into w·dz and (1 − w)·dz, in the dtype of `out`."""
    if z.numel() == 0:
        return
    uncond, weight = (z, 1.0) if guidance is None else (guidance.uncond, guidance.weight)
    second = out if out_uncond is None else out_uncond
    block = min(4096, triton.next_power_of_2(z.shape[1]))
    with on_device_of(z):
        _gradient[(z.shape[0], triton.cdiv(z.shape[1], block))](
            z, uncond, z if bias is None else bias, target, heat, found.top, found.log_total, found.entropy,
            heat if grad_log_prob is None else grad_log_prob, heat if grad_entropy is None else grad_entropy,
            out, second, first, z.shape[1], z.stride(0), uncond.stride(0), out.stride(0), second.stride(0), weight,
            GUIDED=guidance is not None, BIASED=bias is not None, PROB=grad_log_prob is not None,
            ENTROPY=grad_entropy is not None, UNCOND=out_uncond is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip


def _fold_block(num_cols: int) -> tuple[int, int]:
    """Returns words a step and warps: enough loads in flight without spilling."""
    if num_cols <= 2048:
        return triton.next_power_of_2(max(num_cols, 1)), 4
    return (4096, 8) if num_cols <= 32768 else (8192, 16)


def empty_results(num_rows: int, device: torch.device) -> Results:
    """Returns unwritten outputs of N rows."""
    # Separate tensors: an operator's outputs may not share memory.
    return Results(*(torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(4)))
