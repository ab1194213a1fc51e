"""A checkpoint's folder, its weight files, and their tensors. No file's code is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonrl.errors import CheckpointError

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Names of weight files, the better kind first."""
FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a Hub repository."""


def checkpoint_folder(name: str) -> Path:
    """Returns a folder of the name, or else the downloaded files of that Hub repository; raises CheckpointError."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"no checkpoint at {name}: give a folder, 'nano', or a Hub name like owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no folder {name}, and the Hub did not give it ({first_line(error)}): check the name and the network, or"
            " give a folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a checkpoint's weights; raises CheckpointError where one is missing."""
    for name, ending in KINDS:
        index = folder / f"{name}{ending}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise CheckpointError(
                    f"{folder} lacks {len(missing)} of {len(shards)} shards ({', '.join(missing[:3])}): download them"
                )
            return [folder / shard for shard in shards]
        if (folder / f"{name}{ending}").is_file():
            return [folder / f"{name}{ending}"]
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or their shards"
    )


def read_weights(folder: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Returns the weights whose names begin so, on the CPU; raises CheckpointError for a file that cannot be read."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= _read(path, prefix)
    return found


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                return {name: file.get_tensor(name) for name in names}
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is truncated or no safetensors file") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights and was not run: convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}): it is truncated or no torch file"
        ) from error
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's config.json; raises CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json: a checkpoint folder has config.json, weights and tokenizer files"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's mapping; raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}): expected JSON") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
