"""Draw: every random number of a step has an address, so that no row's noise depends on another row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from reasonrl.types import Member


BLOCK = 256
"""Tokens whose probabilities are added before any is looked for."""


@frozen
class Draw:
    """The address of every random number of one step.

    Noise is a function of (seed, step, prompt id, member, stage, use): adding, dropping or reordering
    rows never changes another row's noise.
    """

    seed: int
    step: int

    def key(self, prompt_id: str, member: Member, stage: str, use: str = "sample") -> int:
        """Hashes the address to 63 bits (blake2b)."""
        address = repr((self.seed, self.step, prompt_id, tuple(member), stage, use)).encode()
        return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "big") >> 1


def uniform(keys: Sequence[int], *shape: int) -> Tensor:
    """Returns (N, *shape) float64 in [0, 1), one generator a key, on the CPU."""
    import torch

    rows = [torch.rand(shape, generator=_seeded(key), dtype=torch.float64) for key in keys]
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)


def normal(keys: Sequence[int], *shape: int) -> Tensor:
    """Returns (N, *shape) float32 standard normals, one generator a key, on the CPU."""
    import torch

    rows = [torch.randn(shape, generator=_seeded(key)) for key in keys]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _seeded(key: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(key)


def choose(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Returns (N,) int64 tokens of (N, V) natural log-probs by inverse CDF, summed in float64.

    One uniform in [0, 1) a row decides, so a row's token never depends on another row. A token of
    probability 0 is never chosen.
    """
    import torch

    probs = log_probs.exp()
    rest = -probs.shape[-1] % BLOCK
    probs = torch.nn.functional.pad(probs, (0, rest)) if rest else probs
    probs = probs.unflatten(-1, (-1, BLOCK))
    # First the block, then the token in it: V numbers are added once, and only blocks are searched in whole.
    masses = probs.sum(-1, dtype=torch.float64)
    edges = masses.cumsum(-1)
    # Scaling by the last edge keeps the uniform inside the distribution whatever rounding did to the sum.
    targets = uniforms.to(edges)[:, None] * edges[:, -1:]
    block = torch.minimum(torch.searchsorted(edges, targets, right=True), _last_positive(masses))
    below = torch.where(block > 0, edges.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = probs.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double()
    place = torch.searchsorted(below + inside.cumsum(-1), targets, right=True)
    return (block * BLOCK + torch.minimum(place, _last_positive(inside))).squeeze(-1)


def _last_positive(masses: Tensor) -> Tensor:
    """Returns (N, 1) places of each row's last number above 0."""
    import torch

    places = torch.arange(1, masses.shape[-1] + 1, device=masses.device)
    return ((masses > 0) * places).argmax(-1, keepdim=True)
