"""Attention over one line of packed runs: rows of any length without padding, and what they share only once.

Registered with transformers under a name of its own; without `runs` it is transformers' own attention.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import LlamaModel

NAME = "reasonrl_packed"
Range = tuple[int, int]
FAST = (torch.bfloat16, torch.float16)
"""What flash attention computes in."""


@frozen(eq=False)
class Runs:
    """S runs of tokens that follow each other on a line: run s holds the places cuts[s] to cuts[s + 1].

    A token sees the tokens of its run up to itself, and all of `before[s]`: ranges of the line that other runs hold.
    """

    cuts: tuple[int, ...]
    before: tuple[tuple[Range, ...], ...]
    device: torch.device

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each run."""
        own = [stop - start for start, stop in pairwise(self.cuts)]
        return own, [
            size + sum(stop - start for start, stop in before) for size, before in zip(own, self.before, strict=True)
        ]

    @cached_property
    def masks(self) -> dict[tuple[int, int], Tensor]:
        """(queries, keys) bool of each pair of lengths that differ: True = seen."""
        pairs = {pair for pair in zip(*self.lengths, strict=True) if pair[0] != pair[1]}
        return {
            (own, every): torch.ones(own, every, dtype=torch.bool, device=self.device).tril(every - own)
            for own, every in pairs
        }

    @cached_property
    def key_places(self) -> Tensor:
        """(K,) places on the line of every run's keys, one run after the other."""
        ends = pairwise(self.cuts)
        ranges = [r for before, own in zip(self.before, ends, strict=True) for r in (*before, own)]
        return torch.cat([torch.arange(*r) for r in ranges]).to(self.device)

    @cached_property
    def key_cuts(self) -> Tensor:
        """(S + 1,) int32 places in `key_places`."""
        return F.pad(torch.tensor(self.lengths[1]).cumsum(0), (1, 0)).to(self.device, torch.int32)

    @cached_property
    def query_cuts(self) -> Tensor:
        """(S + 1,) int32 places on the line."""
        return torch.tensor(self.cuts, dtype=torch.int32, device=self.device)


def use_packed_attention(model: LlamaModel) -> None:
    """Lets a language model take `runs=` beside one line of embedded tokens (1, L, D) and their positions."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def no_mask(like: Tensor) -> Tensor:
    """Returns what keeps transformers from building the (L, L) mask of a packed line; `attend` does not read it."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=like.device)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Runs | None = None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Returns (1, L, heads, D) attention of (1, heads, L, D) queries, as transformers asks for it."""
    if runs is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    if query.is_cuda and query.dtype in FAST:
        return _flash(query, key, value, runs, scaling)[None], None
    return _one_by_one(query, key, value, runs, scaling).transpose(1, 2), None


def _flash(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """One launch; flash attention is causal from the end where there are more keys than queries."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    own, every = runs.lengths
    found: Tensor = varlen_attn(
        query.contiguous(),
        key[runs.key_places],
        value[runs.key_places],
        runs.query_cuts,
        runs.key_cuts,
        max(own),
        max(every),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # type: ignore[assignment]  # a pair only where aux outputs are asked for
    return found


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    found = []
    grouped = query.shape[1] != key.shape[1]
    ends = pairwise(runs.cuts)
    for own, before in zip(ends, runs.before, strict=True):
        mine = slice(*own)
        keys, values = (
            torch.cat([part[:, :, slice(*r)] for r in (*before, own)], 2) if before else part[:, :, mine]
            for part in (key, value)
        )
        pair = (own[1] - own[0], keys.shape[2])
        found.append(
            F.scaled_dot_product_attention(
                query[:, :, mine],
                keys,
                values,
                attn_mask=runs.masks[pair] if before else None,
                is_causal=not before,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(found, 2)
