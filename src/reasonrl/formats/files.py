"""A checkpoint's folder, its weight files, and their tensors. No file's code is ever run."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from reasonrl.errors import CheckpointError

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Names of weight files, the better kind first."""
FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a Hub repository."""
POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""
CODE = ("GLOBAL", "reduce", "Can only")
"""What torch says of a pickle that asks for more than tensors."""


def checkpoint_folder(name: str) -> Path:
    """Returns a folder of the name, or else the downloaded files of that Hub repository; raises CheckpointError."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{name} is a file, a checkpoint is a folder: give its folder {folder.parent}")
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
            return _shards(index)
        if (folder / f"{name}{ending}").is_file():
            return [folder / f"{name}{ending}"]
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or their shards"
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise CheckpointError(f"{index} names no shards: expected a weight_map of weights to files, download it again")
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards ({', '.join(missing[:3])}): download them"
        )
    return [index.parent / shard for shard in shards]


def read_weights(folder: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Returns the weights whose names begin so, on the CPU; raises CheckpointError for a file that cannot be read."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= _read(path, prefix)
    return found


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError, safe_open

    _refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                return {name: file.get_tensor(name) for name in names}
        # Files from before torch 1.6 are no zip archives, and cannot be mapped into memory.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is truncated or no safetensors file, download it again"
        ) from error
    except UnpicklingError as error:
        raise _refused_pickle(path, error) from error
    except (RuntimeError, OSError, EOFError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_sentence(error)}): it is truncated or no torch file, download it again"
        ) from error
    return {name: value for name, value in _named_tensors(path, weights).items() if name.startswith(prefix)}


def _refused_pickle(path: Path, error: Exception) -> CheckpointError:
    # torch raises this for code that it did not run, and also for text and for a file that ends early.
    if any(word in str(error) for word in CODE):
        return CheckpointError(
            f"{path} holds more than weights and was not run: convert it to safetensors where you trust it"
        )
    return CheckpointError(f"{path} cannot be read: it is truncated or no torch file, download it again")


def _named_tensors(path: Path, weights: object) -> dict[str, Tensor]:
    found = type(weights).__name__
    if isinstance(weights, Mapping):
        others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
        if not others:
            return dict(weights)
        found = f"{len(others)} entries that are no tensors (first: {', '.join(others[:3])})"
    raise CheckpointError(f"{path} holds {found}, expected tensors by name: save model.state_dict() alone")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer and not the file: run `git lfs pull` in {path.parent}, or download it"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's config.json; raises CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: {_what_it_is(folder)}")
    return read_json(path)


def _what_it_is(folder: Path) -> str:
    """What a folder without config.json may be, and what to give instead."""
    if (folder / "adapter_config.json").is_file():
        whole = folder.parent if (folder.parent / "config.json").is_file() else None
        instead = f"give {whole}, which has it merged" if whole else "merge it into its base with peft, and give that"
        return f"it is a LoRA adapter without its base model; {instead}"
    if (folder / "model" / "config.json").is_file():
        return f"give {folder / 'model'}, the model in it"
    if (folder / "recipe.json").is_file():
        return "it is a run that has not finished; go on with it by --resume, and give its model/ then"
    return "a checkpoint folder has config.json, weights and tokenizer files"


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's mapping; raises CheckpointError."""
    _refuse_pointer(path)
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


def first_sentence(error: BaseException) -> str:
    """Returns the first sentence of what an error says: torch's go on for several."""
    return first_line(error).partition(". ")[0]


def last_line(error: BaseException) -> str:
    """Returns the last line of what an error says, where validators put the reason."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
