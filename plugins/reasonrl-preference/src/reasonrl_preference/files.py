"""Weights from a file on disk or on the hub; never by unpickling code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonrl import ConfigError
from reasonrl.registry import one_line

FAULTS = (EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)
"""What reading a file of another kind raises."""


def located(where: str) -> Path:
    """Returns a path, fetching "owner/name:file" from the hub; ConfigError where there is nothing."""
    if Path(where).exists():
        return Path(where)
    repository, colon, file = where.partition(":")
    if not (colon and "/" in repository):
        raise ConfigError(f"no weights at {where!r}: give a file that exists, or owner/name:file on the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot fetch {where!r} from the hub: {one_line(error)[:200]}") from error


def tensors(where: str) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors or a torch file, by name; what else it holds is refused, not run."""
    path = located(where)
    try:
        found = _read(path)
    except FAULTS as error:
        raise ConfigError(f"{path} is no file of tensors: {one_line(error)[:200]}") from error
    nested = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{path} holds a {type(found).__name__}, expected tensors by name")
    named = {str(name).removeprefix("module."): value for name, value in nested.items() if isinstance(value, Tensor)}
    if not named:
        raise ConfigError(f"{path} holds no tensors, expected weights by name")
    return named


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    return torch.load(path, map_location="cpu", weights_only=True)
