"""A KV cache that grows in place: `DynamicCache` copies every key and value at each token, which is most of a small
model's sampling time (59% of it for the nano checkpoint, 144 rows, one CPU thread)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 64
"""Positions that are allocated ahead."""


class GrowingLayer(DynamicLayer):
    """Keys and values are views of a larger buffer; what attention sees is what DynamicLayer would give."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Starts empty."""
        super().lazy_initialization(key_states, value_states)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (N, heads, t, D) keys and values and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self._fits(after):
            self.buffers = (
                _grown(self.keys if before else None, key_states, after + SPARE),
                _grown(self.values if before else None, value_states, after + SPARE),
            )
        assert self.buffers is not None
        keys, values = self.buffers
        keys[..., before:after, :] = key_states
        values[..., before:after, :] = value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def _fits(self, length: int) -> bool:
        # Repeating or selecting rows replaces the views: they no longer belong to the buffer.
        return (
            self.buffers is not None
            and self.keys.data_ptr() == self.buffers[0].data_ptr()
            and self.keys.shape[0] == self.buffers[0].shape[0]
            and length <= self.buffers[0].shape[-2]
        )


def growing_cache() -> Cache:
    """Returns an empty cache of such layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _grown(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    buffer = torch.empty(*new.shape[:-2], length, new.shape[-1], dtype=new.dtype, device=new.device)
    if old is not None:
        buffer[..., : old.shape[-2], :] = old
    return buffer
