"""The aesthetic predictor's head: linear layers with dropout between them and no nonlinearity, so one affine map."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from reasonrl import ConfigError
from reasonrl_preference.files import tensors


def predicted(head: str, embeddings: Tensor) -> Tensor:
    """Returns (N,) float64 ratings of (N, D) unit embeddings."""
    slope, offset = _affine(head)
    if embeddings.shape[1] != len(slope):
        raise ConfigError(
            f"{head} rates embeddings of width {len(slope)}, got {embeddings.shape[1]}: the predictor of"
            " 768 belongs to CLIP ViT-L/14"
        )
    return embeddings.double().cpu() @ slope + offset


@lru_cache(maxsize=4)
def _affine(head: str) -> tuple[Tensor, Tensor]:
    """Returns (D,) and () float64: the layers multiplied out, from the last to the first."""
    weights = tensors(head)
    names = sorted((n.removesuffix(".weight") for n in weights if n.endswith(".weight")), key=_position)
    layers = [(weights[f"{n}.weight"].double(), weights[f"{n}.bias"].double()) for n in names if f"{n}.bias" in weights]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    fits = all(len(s) == 2 for s in shapes) and [s[0] for s in shapes] == [*(s[1] for s in shapes[1:]), 1]
    if not layers or len(layers) < len(names) or not fits:
        raise ConfigError(f"{head} has layers {shapes}, expected linear layers that end in one number")
    slope, offset = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for weight, bias in reversed(layers):
        slope, offset = slope @ weight, offset + slope @ bias
    return slope, offset


def _position(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())
