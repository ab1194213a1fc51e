"""A linear head cut in blocks: where their logits come from and where their gradients go."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.chunks import Plan
from reasonrl.kernels.matmul import exact_products, product


class Head:
    """Makes blocks of the logits hidden Wᵀ + uBᵀ, in memory that the next block takes again."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        cuts: Plan,
        *,
        rounded: bool,
    ) -> None:
        self.low_hidden, self.low_weight = low_hidden, low_weight
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.rounded = rounded and weight.dtype != self.dtype
        self.operand = hidden.to(weight.dtype)
        # A CPU's product has its operands' dtype: float32 logits need float32 copies, of a block and no more.
        lifted = self.dtype if not (self.rounded or weight.is_cuda) else weight.dtype
        self._weight = _Copy(weight, cuts.cols, lifted)
        self._parts = [_Copy(part, cuts.rows, lifted) for part in self._in_parts(hidden, weight)]
        self.most = min(cuts.rows, len(hidden)) * min(cuts.cols, len(weight))
        self._room = torch.empty(self.most, dtype=weight.dtype if self.rounded else self.dtype, device=weight.device)

    def logits(self, v0: int, v1: int, r0: int, r1: int) -> Tensor:
        """Returns (R, C) logits without bias, in float32 unless rounded."""
        z = self._room[: (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)
        columns = self._weight.rows(v0, v1).T
        with exact_products(self._parts[0].source):
            for num, part in enumerate(self._parts):
                product(part.rows(r0, r1), columns, z, add=num > 0)
        if self.low_hidden is not None and self.low_weight is not None:
            z.addmm_(self.low_hidden[r0:r1].to(z.dtype), self.low_weight[v0:v1].to(z.dtype).T)
        return z

    def _in_parts(self, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        """Returns what adds up to hidden and can be multiplied with the weight.

        Float32 states have 24 bits, bfloat16 ones 8: on CUDA three of these hold them all. Float16 has
        11: two hold all but the last two.
        """
        if self.rounded or hidden.dtype == weight.dtype:
            return [self.operand]
        if not weight.is_cuda:
            return [hidden]
        parts, rest = [], hidden
        for _ in range(2 if weight.dtype == torch.float16 else 3):
            parts.append(rest.to(weight.dtype))
            rest = rest - parts[-1]
        return parts


class _Copy:
    """The rows last asked for in another dtype; the source's own where it has that dtype."""

    def __init__(self, source: Tensor, most: int, dtype: torch.dtype) -> None:
        self.source, self.at = source, (0, 0)
        self.copy = None
        if source.dtype != dtype:
            self.copy = torch.empty(min(most, len(source)), source.shape[1], dtype=dtype, device=source.device)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.copy is None:
            return self.source[start:stop]
        found = self.copy[: stop - start]
        if self.at != (start, stop):
            found.copy_(self.source[start:stop])
            self.at = (start, stop)
        return found


class GradientSum:
    """A gradient that blocks add to: in float32, or written once where one block makes all of it."""

    def __init__(self, like: Tensor | None, total: Tensor | None, *, once: bool) -> None:
        self.like, self.total, self.once = like, total, once
        self.room: Tensor | None = None

    @classmethod
    def of(cls, like: Tensor | None, needed: bool, once: bool) -> GradientSum:
        """Returns the sum of a tensor's gradient, one that adds nothing up where that is not needed."""
        if like is None or not needed:
            return cls(None, None, once=once)
        # Float16 sums over rows of scaled gradients may overflow before they are unscaled.
        whole = once and like.dtype != torch.float16
        dtype = like.dtype if whole or like.dtype == torch.float64 else torch.float32
        made = torch.empty if once else torch.zeros
        return cls(like, made(like.shape, dtype=dtype, device=like.device), once=once)

    def add(self, start: int, stop: int, left: Tensor, right: Tensor) -> None:
        """Adds left @ right to rows start to stop.

        On a CPU the products of a sum are rounded to bfloat16 before they are added, in float32: half the time, for
        one more rounding of the kind that dz has been through (2.7e-3 relative together; the limit is 4e-3).
        """
        if self.total is None:
            return
        part = self.total[start:stop]
        if self.once and part.dtype in (left.dtype, torch.float32):
            product(left, right, part)
        elif self.once:
            part.copy_(left @ right)
        elif left.is_cuda or left.dtype != torch.bfloat16:
            product(left, right, part, add=True)
        else:
            part.add_(torch.mm(left, right, out=self._room(part, left.dtype)))

    def done(self, of: Tensor, scale: Tensor | None) -> Tensor:
        """Returns the gradient over `scale`, in its tensor's dtype; empty, beside `of`, where it was not needed."""
        if self.total is None or self.like is None:
            return of.new_empty(0)  # a new one each time: an operator's outputs may not share memory
        total = self.total if scale is None else self.total.div_(scale)
        return total.to(self.like.dtype)

    def _room(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        if self.room is None or self.room.numel() < part.numel():
            self.room = torch.empty(part.numel(), dtype=dtype, device=part.device)
        return self.room[: part.numel()].view(part.shape)
