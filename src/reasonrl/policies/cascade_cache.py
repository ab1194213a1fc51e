"""A KV cache of rows that share prefixes: a prefix is kept, and read, once for all the rows that begin with it.

Attention to a shared prefix is one matrix product a prefix instead of one a row (Hydragen, arXiv 2402.05099). Both
parts go through one softmax: nothing is approximated.
"""

from __future__ import annotations

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer."""


class Cascade:
    """Keys and values of N = P·R rows: R behind each of P prefixes, and what each row has added since.

    Prefixes are (P, heads, L, D), and `seen` (P, R, L) bool says which of their positions a row attends to. Additions
    are (P, heads, R, T, D), the first `used` (N,) of them real. On a CPU all are float32 whatever the model's dtype:
    the product of one row with its keys is several times faster so, and finer.
    """

    def __init__(self, prefix: Layers, seen: Tensor, *, capacity: int) -> None:
        keys = prefix[0][0]
        self.dtype = keys.dtype if keys.is_cuda else torch.promote_types(keys.dtype, torch.float32)
        self.prefix = [(k.to(self.dtype), v.to(self.dtype)) for k, v in prefix]
        self.seen = seen
        num_prefixes, rows = seen.shape[:2]
        self.used = torch.zeros(num_prefixes * rows, dtype=torch.long, device=keys.device)
        self.behind = torch.arange(num_prefixes, device=keys.device).repeat_interleave(rows)
        self.member = torch.arange(rows, device=keys.device).repeat(num_prefixes)
        self.begin = seen.sum(2).flatten()
        """(N,) positions that the prefix takes."""
        self.all_seen = bool(seen.all())
        self.all_even = True
        """Every row has added as many."""
        self.added = [(self._room(k, capacity), self._room(v, capacity)) for k, v in prefix]

    @property
    def capacity(self) -> int:
        """Additions that there is room for."""
        return self.added[0][0].shape[3]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.used)

    def hidden(self, span: int) -> Tensor | None:
        """(P, R, L + span) bool: what a row must not see of its prefix and of `span` additions; None = it sees all.

        `span` is at least one more than the most that a row has `used`, and on a CPU no more than that.
        """
        if self.all_seen and self.all_even and not self.used.is_cuda:
            return None
        later = torch.arange(span, device=self.used.device) > self.used[:, None]
        return torch.cat([~self.seen, later.view(*self.seen.shape[:2], span)], 2)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden: Tensor | None,
        span: int,
        scale: float,
    ) -> Tensor:
        """Returns (N, heads, D) attention of one query a row, whose (N, kv heads, D) key and value join first."""
        keys, values = self.added[layer]
        keys[self.behind, :, self.member, self.used] = key.to(self.dtype)
        values[self.behind, :, self.member, self.used] = value.to(self.dtype)
        (num_prefixes, kv_heads, rows), width = keys.shape[:3], keys.shape[4]
        groups = query.shape[1] // kv_heads
        # (N, heads, D) -> (P kv, R groups, D): the rows of a prefix, and the heads of a key, side by side.
        asked = (query.to(self.dtype) * scale).view(num_prefixes, rows, kv_heads, groups, width).transpose(1, 2)
        asked = asked.reshape(num_prefixes * kv_heads, rows * groups, width)
        near = asked.reshape(-1, groups, width)
        far_keys, far_values = (part.flatten(0, 1) for part in self.prefix[layer])
        near_keys, near_values = (part.flatten(0, 2)[:, :span] for part in (keys, values))
        scores = torch.cat(
            [_product(asked, far_keys.mT), _product(near, near_keys.mT).reshape(len(asked), rows * groups, span)], 2
        )
        if hidden is not None:
            blocks = scores.view(num_prefixes, kv_heads, rows, groups, -1)
            blocks.masked_fill_(hidden[:, None, :, None], -torch.inf)
        far, own = scores.softmax(2).to(self.dtype).split([far_keys.shape[1], span], 2)
        found = torch.bmm(own.reshape(len(near), groups, span), near_values).reshape(asked.shape)
        found = torch.baddbmm(found, far, far_values)
        found = found.view(num_prefixes, kv_heads, rows, groups, width).transpose(1, 2)
        return found.reshape(query.shape).to(query.dtype)

    @property
    def positions(self) -> Tensor:
        """(N,) position of each row's next token."""
        return self.begin + self.used

    def advance(self) -> None:
        """Counts the token that every layer has been given."""
        self.used += 1

    def grow(self, capacity: int) -> None:
        """Makes room for more additions."""
        self.added = [(_longer(k, capacity), _longer(v, capacity)) for k, v in self.added]

    def take(self, rows: Tensor) -> Layers:
        """Returns copies of what these rows have added: (n, heads, T, D)."""
        at = self.behind[rows], self.member[rows]
        return [(k[at[0], :, at[1]], v[at[0], :, at[1]]) for k, v in self.added]

    def put(self, rows: Tensor, layers: Layers, used: Tensor) -> None:
        """Gives rows the additions that `take` returned, `used` (n,) of them real."""
        behind, member = self.behind[rows], self.member[rows]
        for (keys, values), (new_keys, new_values) in zip(self.added, layers, strict=True):
            length = min(new_keys.shape[2], self.capacity)
            keys[behind, :, member, :length] = new_keys[:, :, :length]
            values[behind, :, member, :length] = new_values[:, :, :length]
        self.used[rows] = used
        self.all_even = bool((self.used == self.used[0]).all())

    def selected(self, rows: Tensor) -> Cascade:
        """Returns a cache of a rectangle (P', R') of rows, where each line shares a prefix."""
        lines = self.behind[rows[:, 0]]
        prefix = [(k[lines], v[lines]) for k, v in self.prefix]
        flat = rows.flatten()
        seen = self.seen[self.behind[flat], self.member[flat]].view(*rows.shape, -1)
        found = Cascade(prefix, seen, capacity=self.capacity)
        found.put(torch.arange(len(flat), device=flat.device), self.take(flat), self.used[flat])
        return found

    def closed(self, times: int, *, capacity: int) -> Cascade:
        """Returns a cache in which each row is a prefix, with all it has added, that `times` rows share."""
        rows = self.seen.shape[1]
        prefix = [
            (_lined_up(k, far_k, rows), _lined_up(v, far_v, rows))
            for (k, v), (far_k, far_v) in zip(self.added, self.prefix, strict=True)
        ]
        real = torch.arange(self.capacity, device=self.used.device) < self.used[:, None]
        seen = torch.cat([self.seen.flatten(0, 1), real], 1)
        return Cascade(prefix, seen[:, None].expand(-1, times, -1), capacity=capacity)

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        num_prefixes, heads, _, width = like.shape
        shape = (num_prefixes, heads, self.seen.shape[1], capacity, width)
        return torch.zeros(shape, dtype=self.dtype, device=like.device)


def _lined_up(added: Tensor, far: Tensor, rows: int) -> Tensor:
    """Returns (P·R, heads, L + T, D): each row's prefix, and what it has added."""
    return torch.cat([far.repeat_interleave(rows, 0), added.transpose(1, 2).flatten(0, 1)], 2)


def _longer(old: Tensor, capacity: int) -> Tensor:
    new = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
    new[:, :, :, : old.shape[3]] = old
    return new


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns (B, M, N) products, in float32 where the operands are 16-bit."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)
