"""The log-prob operators torch knows: opaque to torch.compile, with fakes and gradients, one for each direction.

A block of logits is made, folded into its rows' statistics and forgotten; the backward makes it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels import epilogue
from reasonrl.kernels.chunks import Plan, cpu_plan, plan
from reasonrl.kernels.epilogue import SKIP, Guidance, Results, Statistics
from reasonrl.kernels.head import GradientSum, Head

ROW_BLOCK = 2**20
"""Logits that the torch backend widens at once: 4 MB, which a processor's cache holds."""


@torch.library.custom_op("reasonrl::logits_log_prob", mutates_args=())
def logits_log_prob(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_weight: float,
    target: Tensor,
    heat: Tensor,
    entropy: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns log-prob, entropy, top and log-total (N,) of logits (N, V)."""
    if triton:
        from reasonrl.kernels import triton_log_prob

        results = triton_log_prob.empty_results(len(logits), logits.device)
        unused = Statistics(results.top, results.log_prob, results.log_prob, results.log_prob)
        pair = None if uncond is None else Guidance(uncond, cfg_weight)
        triton_log_prob.fold(
            logits, target, heat, unused, results, first=0, fresh=True, last=True, guidance=pair, entropy=entropy
        )
        return results.log_prob, results.entropy, results.top, results.log_total
    state = Statistics.empty(len(logits), logits)
    for r0, r1 in _row_blocks(logits):
        pair = None if uncond is None else Guidance(uncond[r0:r1], cfg_weight)
        block = logits[r0:r1].to(state.top.dtype, copy=True)
        epilogue.fold(block, target[r0:r1], heat[r0:r1], state.rows(r0, r1), guidance=pair, entropy=entropy)
    found = epilogue.finish(target, heat, state)
    return found.log_prob, found.entropy, found.top, found.log_total


@logits_log_prob.register_fake
def _(logits, uncond, cfg_weight, target, heat, entropy, triton):
    return tuple(_fake_statistics(logits))


@torch.library.custom_op("reasonrl::logits_log_prob_backward", mutates_args=())
def logits_log_prob_backward(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    uncond: Tensor | None,
    cfg_weight: float,
    target: Tensor,
    heat: Tensor,
    entropy: Tensor,
    top: Tensor,
    log_total: Tensor,
    learns_uncond: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of logits and uncond; the second is empty unless it is wanted."""
    found = Results(top, entropy, top, log_total)
    out = torch.empty_like(logits)
    second = torch.empty_like(uncond) if learns_uncond and uncond is not None else logits.new_empty(0)
    if triton:
        from reasonrl.kernels import triton_log_prob

        pair = None if uncond is None else Guidance(uncond, cfg_weight)
        triton_log_prob.gradient(
            logits, target, heat, found, grad_log_prob, grad_entropy, out,
            guidance=pair, out_uncond=second if learns_uncond else None,
        )  # fmt: skip
        return out, second
    for r0, r1 in _row_blocks(logits):
        pair = None if uncond is None else Guidance(uncond[r0:r1], cfg_weight)
        block = logits[r0:r1].to(top.dtype, copy=True)
        found_here = Results(*(v[r0:r1] for v in (top, entropy, top, log_total)))
        each = [None if g is None else g[r0:r1] for g in (grad_log_prob, grad_entropy)]
        dz = epilogue.gradient(block, target[r0:r1], heat[r0:r1], found_here, each[0], each[1], guidance=pair)
        if learns_uncond:
            second[r0:r1] = dz * (1 - cfg_weight)
        out[r0:r1] = dz if uncond is None else dz * cfg_weight
    return out, second


@logits_log_prob_backward.register_fake
def _(g, gh, logits, uncond, cfg_weight, target, heat, entropy, top, log_total, learns_uncond, triton):
    return torch.empty_like(logits), torch.empty_like(uncond) if learns_uncond else logits.new_empty(0)


def _logits_setup(ctx, inputs, output):
    logits, uncond, cfg_weight, target, heat, _, triton = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, uncond, target, heat, *output[1:])
    ctx.cfg_weight, ctx.triton = cfg_weight, triton


def _logits_gradients(ctx, grad_log_prob, grad_entropy, *_):
    logits, uncond, target, heat, entropy, top, log_total = ctx.saved_tensors
    if grad_log_prob is None and grad_entropy is None:
        return (None,) * 7
    needed = ctx.needs_input_grad[1]
    first, second = logits_log_prob_backward(
        _flat(grad_log_prob), _flat(grad_entropy), logits, uncond, ctx.cfg_weight, target, heat,
        entropy, top, log_total, needed, ctx.triton,
    )  # fmt: skip
    return first, second if needed else None, None, None, None, None, None


logits_log_prob.register_autograd(_logits_gradients, setup_context=_logits_setup)


@torch.library.custom_op("reasonrl::linear_log_prob", mutates_args=())
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    target: Tensor,
    heat: Tensor,
    workspace: int,
    rounded: bool,
    entropy: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns log-prob, entropy, top and log-total (N,) of the logits hidden Wᵀ + b + uBᵀ, which are never held."""
    cuts = _plan(hidden, weight, workspace, item=4, learns_weight=False)
    head = Head(hidden, weight, low_hidden, low_weight, cuts, rounded=rounded)
    state = Statistics.empty(len(hidden), hidden)
    results = Results(state.spread, state.spread, state.top, state.total)
    if triton:
        from reasonrl.kernels import triton_log_prob

        results = triton_log_prob.empty_results(len(hidden), hidden.device)
    for v0, v1, r0, r1 in cuts.blocks(len(hidden), len(weight)):
        z = head.logits(v0, v1, r0, r1)
        part = state.rows(r0, r1)
        if triton:
            here = Results(*(v[r0:r1] for v in (results.log_prob, results.entropy, results.top, results.log_total)))
            triton_log_prob.fold(
                z, target[r0:r1], heat[r0:r1], part, here, first=v0, fresh=v0 == 0, last=v1 == len(weight),
                bias=None if bias is None else bias[v0:v1], entropy=entropy,
            )  # fmt: skip
        else:
            part_bias = None if bias is None else bias[v0:v1]
            epilogue.fold(z, target[r0:r1], heat[r0:r1], part, first=v0, bias=part_bias, entropy=entropy)
    if not triton:
        results = epilogue.finish(target, heat, state)
    return results.log_prob, results.entropy, results.top, results.log_total


@linear_log_prob.register_fake
def _(hidden, weight, bias, low_hidden, low_weight, target, heat, workspace, rounded, entropy, triton):
    return tuple(_fake_statistics(hidden))


@torch.library.custom_op("reasonrl::linear_log_prob_backward", mutates_args=())
def linear_log_prob_backward(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    target: Tensor,
    heat: Tensor,
    entropy: Tensor,
    top: Tensor,
    log_total: Tensor,
    workspace: int,
    rounded: bool,
    needed: list[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of hidden, weight, bias, low_hidden, low_weight; empty where not `needed`."""
    if weight.dtype == torch.float16:
        return _without_underflow(
            grad_log_prob, grad_entropy, hidden, weight, bias, low_hidden, low_weight, target, heat, entropy, top,
            log_total, workspace, rounded, needed, triton,
        )  # fmt: skip
    return _backward(
        grad_log_prob, grad_entropy, hidden, weight, bias, low_hidden, low_weight, target, heat, entropy, top,
        log_total, workspace, rounded, needed, triton,
    )  # fmt: skip


@linear_log_prob_backward.register_fake
def _(g, gh, hidden, weight, bias, low_hidden, low_weight, target, heat, ent, top, log_total, ws, rounded, needed, t):
    inputs = (hidden, weight, bias, low_hidden, low_weight)
    return tuple(
        value.new_empty(value.shape) if wanted and value is not None else hidden.new_empty(0)
        for value, wanted in zip(inputs, needed, strict=True)
    )


def _backward(
    grad_log_prob, grad_entropy, hidden, weight, bias, low_hidden, low_weight, target, heat, entropy, top,
    log_total, workspace, rounded, needed, triton, scale=None,
):  # fmt: skip
    needs_hidden, needs_weight, needs_bias, needs_low_hidden, needs_low_weight = needed
    cuts = _plan(hidden, weight, workspace, item=4 + weight.element_size(), learns_weight=needs_weight)
    head = Head(hidden, weight, low_hidden, low_weight, cuts, rounded=rounded)
    to_hidden = GradientSum.of(hidden, needs_hidden, cuts.cols >= len(weight))
    to_weight = GradientSum.of(weight, needs_weight, 0 < len(hidden) <= cuts.rows)
    to_bias = torch.zeros_like(bias, dtype=top.dtype) if needs_bias else None
    to_low_hidden = GradientSum.of(low_hidden, needs_low_hidden, cuts.cols >= len(weight))
    to_low_weight = GradientSum.of(low_weight, needs_low_weight, 0 < len(hidden) <= cuts.rows)
    operand, low_operand = head.operand, low_hidden
    if hidden.is_cuda or bool((target == SKIP).any()):  # asking a GPU would mean to wait for it
        # A row that is left out may hold nan, and 0 × nan is nan.
        kept = (target != SKIP)[:, None]
        operand = torch.where(kept, operand, 0.0) if needs_weight else operand
        low_operand = None if low_hidden is None else torch.where(kept, low_hidden, 0.0)
    room = torch.empty(head.most if triton else 0, dtype=weight.dtype, device=weight.device)
    for v0, v1, r0, r1 in cuts.blocks(len(hidden), len(weight)):
        z = head.logits(v0, v1, r0, r1)
        found = Results(*(v[r0:r1] for v in (top, entropy, top, log_total)))
        each = [None if g is None else g[r0:r1] for g in (grad_log_prob, grad_entropy)]
        part_bias = None if bias is None else bias[v0:v1]
        if triton:
            from reasonrl.kernels import triton_log_prob

            dz = room[: z.numel()].view(z.shape)
            triton_log_prob.gradient(
                z, target[r0:r1], heat[r0:r1], found, each[0], each[1], dz, first=v0, bias=part_bias
            )
        else:
            dz = epilogue.gradient(z, target[r0:r1], heat[r0:r1], found, each[0], each[1], first=v0, bias=part_bias).to(
                weight.dtype
            )
        to_hidden.add(r0, r1, dz, weight[v0:v1])
        to_weight.add(v0, v1, dz.T, operand[r0:r1])
        if to_bias is not None:
            to_bias[v0:v1] += dz.sum(0, dtype=top.dtype)
        if low_hidden is not None:
            to_low_hidden.add(r0, r1, dz, low_weight[v0:v1].to(dz.dtype))
            to_low_weight.add(v0, v1, dz.T, low_operand[r0:r1].to(dz.dtype))
    return (
        to_hidden.done(hidden, scale),
        to_weight.done(hidden, scale),
        hidden.new_empty(0) if to_bias is None else (to_bias if scale is None else to_bias / scale).to(bias.dtype),
        to_low_hidden.done(hidden, scale),
        to_low_weight.done(hidden, scale),
    )


def _without_underflow(grad_log_prob, grad_entropy, *rest):
    """Returns `_backward` of gradients scaled by a power of two to about 1: float16 ends at 6e-8."""
    given = [g for g in (grad_log_prob, grad_entropy) if g is not None]
    largest = torch.stack([g.abs().amax() if len(g) else g.sum() for g in given]).amax().clamp(min=1e-30)
    scale = torch.exp2(-largest.log2().floor())
    scaled = [None if g is None else g * scale for g in (grad_log_prob, grad_entropy)]
    return _backward(*[*scaled, *rest, scale])


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, low_hidden, low_weight, target, heat, workspace, rounded, _, triton = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, low_hidden, low_weight, target, heat, *output[1:])
    ctx.workspace, ctx.rounded, ctx.triton = workspace, rounded, triton


def _linear_gradients(ctx, grad_log_prob, grad_entropy, *_):
    if grad_log_prob is None and grad_entropy is None:
        return (None,) * 11
    needed = list(ctx.needs_input_grad[:5])
    found = linear_log_prob_backward(
        _flat(grad_log_prob), _flat(grad_entropy), *ctx.saved_tensors, ctx.workspace, ctx.rounded, needed, ctx.triton
    )
    return (*(value if wanted else None for value, wanted in zip(found, needed, strict=True)), *(None,) * 6)


linear_log_prob.register_autograd(_linear_gradients, setup_context=_linear_setup)


def _plan(hidden: Tensor, weight: Tensor, workspace: int, *, item: int, learns_weight: bool) -> Plan:
    num_rows, vocab, width = len(hidden), len(weight), hidden.shape[1]
    if hidden.is_cuda:
        return plan(num_rows, vocab, width, workspace=workspace, item=item, learns_weight=learns_weight)
    return cpu_plan(num_rows, vocab, width, workspace=workspace, learns_weight=learns_weight)


def _row_blocks(logits: Tensor) -> list[tuple[int, int]]:
    size = max(1, ROW_BLOCK // max(logits.shape[1], 1))
    return [(r, min(r + size, len(logits))) for r in range(0, len(logits), size)]


def _fake_statistics(like: Tensor) -> list[Tensor]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [like.new_empty(like.shape[0], dtype=dtype) for _ in range(4)]


def _flat(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()
