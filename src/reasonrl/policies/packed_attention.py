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
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import LlamaModel

NAME = "reasonrl_packed"
Range = tuple[int, int]
FAST = (torch.bfloat16, torch.float16)
"""What flash attention computes in."""


ALIKE = 1.25
"""Runs whose lengths differ by less than this factor are one batch; below SMALL tokens any are."""
SMALL = 32
MOST_PAIRS = 2**22
"""Pairs of a query and a key that one batch holds, if it holds more than one run."""


@frozen(eq=False)
class Block:
    """B runs of about one length as a padded batch: its padding is of attention alone."""

    queries: Tensor
    """(B, Q) places on the line."""
    keys: Tensor
    """(B, K)."""
    seen: Tensor
    """(B, 1, Q, K) bool."""
    real: Tensor
    """(n,) places of the queries that are none of the padding, of B · Q."""


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
    def blocks(self) -> list[Block]:
        """The runs in batches, the shortest first."""
        own, every = self.lengths
        groups: list[list[int]] = []
        for run in sorted(range(len(own)), key=own.__getitem__):
            group = groups[-1] if groups else []
            most = max((every[r] for r in group), default=0)
            pairs = (len(group) + 1) * own[run] * max(most, every[run])
            if group and own[run] <= max(SMALL, ALIKE * own[group[0]]) and pairs <= MOST_PAIRS:
                group.append(run)
            else:
                groups.append([run])
        return [self._block(group) for group in groups]

    @cached_property
    def order(self) -> Tensor:
        """(L,) places of the line's queries among the real ones of all blocks."""
        return torch.cat([block.queries.flatten()[block.real] for block in self.blocks]).argsort()

    def _block(self, group: list[int]) -> Block:
        own, every = (torch.tensor([sizes[run] for run in group])[:, None] for sizes in self.lengths)
        places = self.key_places.cpu()
        cuts = self.key_cuts.tolist()
        keys = pad_sequence([places[cuts[run] : cuts[run + 1]] for run in group], batch_first=True)
        starts = torch.tensor([self.cuts[run] for run in group])[:, None]
        query, key = torch.arange(int(own.max())), torch.arange(keys.shape[1])
        real = query < own
        # What came before stands first among a run's keys. A query of the padding sees one of them, and is dropped.
        seen = key <= torch.where(real, every - own + query, 0)[..., None]
        queries = torch.where(real, starts + query, starts)
        found = (queries, keys, seen[:, None], real.flatten().nonzero().squeeze(1))
        return Block(*(part.to(self.device) for part in found))

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
    return _padded(query, key, value, runs, scaling)[None], None


def _flash(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """One launch; flash attention is causal from the end where there are more keys than queries."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    own, every = runs.lengths
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
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
        **grouped,
    )  # type: ignore[assignment]  # a pair only where aux outputs are asked for
    return found


def _padded(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """A call for each block of runs; (L, heads, D)."""
    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    found = []
    for block in runs.blocks:
        asked, keys, values = (
            part[places].transpose(1, 2)
            for part, places in ((query, block.queries), (key, block.keys), (value, block.keys))
        )
        answer = F.scaled_dot_product_attention(
            asked, keys, values, attn_mask=block.seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        found.append(answer.transpose(1, 2).flatten(0, 1)[block.real])
    return torch.cat(found)[runs.order]
