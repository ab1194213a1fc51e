"""What the kernels refuse, in one line that states the actual shapes. Host-side only: nothing here waits for a GPU."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from reasonrl.errors import ContractError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def floats(**tensors: Tensor | None) -> None:
    """Raises ContractError for tensors that are sharded, not floating, or on another device than the first."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first = next(iter(given))
    for name, value in given.items():
        _plain(name, value)
        if value.dtype not in FLOATS:
            raise ContractError(f"{name} must be bfloat16, float16, float32 or float64, got {_said(value)}")
        if value.device != given[first].device:
            raise ContractError(
                f"{name} is on {value.device} and {first} on {given[first].device}: move them to one device"
            )


def targets(target: Tensor, shape: torch.Size, device: torch.device, *, of: str) -> None:
    """Raises ContractError unless there is one integer target for each position."""
    _plain("target", target)
    if target.dtype not in (torch.int32, torch.int64):
        raise ContractError(f"target must be int32 or int64 word ids, got {_said(target)}")
    if target.shape != shape:
        raise ContractError(f"target must be {tuple(shape)}, one for each position of {of}, got {_said(target)}")
    if target.device != device:
        raise ContractError(f"target is on {target.device} and {of} on {device}: move them to one device")


def same_shape(name: str, value: Tensor | None, shape: torch.Size | tuple[int, ...], *, of: str) -> None:
    """Raises ContractError unless the value is absent or has the shape that `of` asks for."""
    if value is not None and value.shape != torch.Size(shape):
        raise ContractError(f"{name} must be {tuple(shape)} to fit {of}, got {_said(value)}")


def masks(mask: Tensor | None, shape: torch.Size, *, of: str) -> None:
    """Raises ContractError unless the mask is absent, or bool of the positions' shape."""
    if mask is None:
        return
    _plain("mask", mask)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ContractError(f"mask must be bool of {tuple(shape)}, the positions of {of}, got {_said(mask)}")


def temperatures(temperature: float | Tensor, shape: torch.Size) -> None:
    """Raises ContractError unless above 0: a number, or one for each position (whose values are checked on a CPU)."""
    if not isinstance(temperature, Tensor):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ContractError(f"temperature must be a finite number above 0, got {temperature}")
        return
    _plain("temperature", temperature)
    if temperature.shape != shape or not temperature.is_floating_point():
        raise ContractError(f"temperature must be a number, or float of {tuple(shape)}, got {_said(temperature)}")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
        raise ContractError(f"temperature must be above 0 everywhere, got {float(temperature.min())}")


def _plain(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ContractError(f"{name} must be a tensor, got {type(value).__name__}")
    sharded = sys.modules.get("torch.distributed.tensor")
    if sharded is not None and isinstance(value, sharded.DTensor):
        raise ContractError(
            f"{name} is a DTensor of {tuple(value.shape)}: call the kernels inside forward, or pass full_tensor()"
        )


def _said(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of {tuple(value.shape)}"
