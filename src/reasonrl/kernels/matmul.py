"""Matrix products of low-precision operands with float32 results, on each device's own way to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    switches: list[tuple[Any, str, object]] = []
    if operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16):
        half = "bf16" if operand.dtype == torch.bfloat16 else "fp16"
        switches = [(torch.backends.cuda.matmul, f"allow_{half}_reduced_precision_reduction", False)]
    elif operand.dtype == torch.bfloat16:
        switches = [(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")]  # type: ignore[attr-defined]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
