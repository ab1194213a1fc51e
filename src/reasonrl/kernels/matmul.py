"""Matrix products of low-precision operands with float32 results, on each device's own way to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Returns left @ right in `out`, or added to it; out's dtype is float32 where the operands' is lower.

    Accumulation is never in the operands' precision. On a CPU, operands of another dtype than `out` are copied.
    """
    with exact_products(left):
        if left.is_cuda and left.dtype != out.dtype:
            if add:
                return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
            return torch.mm(left, right, out_dtype=out.dtype, out=out)
        left, right = left.to(out.dtype), right.to(out.dtype)
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


@contextlib.contextmanager
def exact_products(operand: Tensor) -> Iterator[None]:
    """Sets how products of an operand's kind are made: summed in float32, and as fast as that can be.

    A CPU's oneDNN may take float32 copies of bfloat16 operands for what they are: the same bits, less time (1.5e-7
    relative against float64, kernels' study). CUDA's cuBLAS may not sum parts of a long product in 16 bits. These
    switches belong to the process: one thread at a time should compute log-probs.
    """
    if operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16):
        half = "bf16" if operand.dtype == torch.bfloat16 else "fp16"
        owner: Any = torch.backends.cuda.matmul
        name = f"allow_{half}_reduced_precision_reduction"
        before, split = getattr(owner, name), getattr(owner, f"{name}_split_k", None)
        within: object = False if split is None else (False, split)
        after: object = before if split is None else (before, split)
    elif operand.dtype == torch.bfloat16:
        owner, name = torch.backends.mkldnn.matmul, "fp32_precision"  # type: ignore[attr-defined]
        before = owner.fp32_precision
        # What was inherited goes on being inherited.
        within, after = "bf16", "none" if before == torch.backends.mkldnn.fp32_precision else before
    else:
        yield
        return
    setattr(owner, name, within)
    try:
        yield
    finally:
        setattr(owner, name, after)


def ready_product(weight: Tensor, bias: Tensor | None = None, *, num_rows: int = 32) -> Callable[[Tensor], Tensor]:
    """Returns x ↦ x Wᵀ + b for many calls of about `num_rows` rows, without gradient.

    On a CPU it holds a copy of the weight blocked as oneDNN wants it, where torch would reorder the weight at every
    call: for a few rows that costs as much as the product. Elsewhere it is torch's own.
    """
    if not _can_block(weight):
        return lambda value: torch.nn.functional.linear(value, weight, bias)
    operators = torch.ops.mkldnn
    blocked = operators._reorder_linear_weight(weight.detach(), num_rows)
    return lambda value: operators._linear_pointwise(value, blocked, bias, "none", [], "")


def _can_block(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
