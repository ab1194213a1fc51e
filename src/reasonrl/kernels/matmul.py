"""Matrix products of low-precision operands with float32 results, on each device's own way to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Returns left @ right in `out`, float32 (or float64); accumulation is never in the operands' precision."""
    if left.is_cuda:
        if left.dtype == out.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    with _exact_bfloat16(left, right):
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left @ right to the float32 total, in place."""
    if left.is_cuda and left.dtype != total.dtype:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    with _exact_bfloat16(left, right):
        return total.addmm_(left.to(total.dtype), right.to(total.dtype))


@contextlib.contextmanager
def _exact_bfloat16(left: Tensor, right: Tensor) -> Iterator[None]:
    """Lets oneDNN multiply float32 copies of bfloat16 operands as what they are: the same bits, less time.

    The results stay float32 (1.5e-7 relative against float64, kernels' study). The switch belongs to the process: only
    one thread at a time should compute log-probs.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not (left.dtype == right.dtype == torch.bfloat16):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
