"""Matrix products of low-precision operands with float32 results, on each device's own way to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Returns left @ right in `out`, or added to it; out's dtype is float32 where the operands' is lower.

    Accumulation is never in the operands' precision. On a CPU, operands of another dtype than `out` are copied.
    """
    if left.is_cuda and left.dtype != out.dtype:
        if add:
            return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    with exact_products(left.dtype) if left.dtype != out.dtype else contextlib.nullcontext():
        left, right = left.to(out.dtype), right.to(out.dtype)
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN multiply float32 copies of bfloat16 operands as what they are: the same bits, less time.

    The results stay float32 (1.5e-7 relative against float64, kernels' study). The switch belongs to the process: only
    one thread at a time should compute log-probs.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
