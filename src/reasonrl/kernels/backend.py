"""Which backend runs: Triton on CUDA, torch elsewhere. Never a silent fallback."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from reasonrl.errors import ConfigError

Backend = Literal["auto", "torch", "triton"]

INSTALLED = importlib.util.find_spec("triton") is not None
"""Asked once, here: torch.compile cannot trace the question."""


def uses_triton(backend: Backend, tensor: Tensor) -> bool:
    """Returns whether Triton runs this; raises ConfigError for a backend that cannot."""
    if backend not in ("auto", "torch", "triton"):
        raise ConfigError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    if not tensor.is_cuda:
        raise ConfigError(
            f"backend='triton' needs tensors on a CUDA device, got {tensor.device}: move them, or leave backend='auto'"
        )
    if not INSTALLED:
        raise ConfigError("Triton is not installed and the tensors are on CUDA: pip install triton, or backend='torch'")
    return True


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Returns the context Triton is launched in: it takes the current device, whatever its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
