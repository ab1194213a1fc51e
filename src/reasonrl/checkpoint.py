"""Checkpoints: a run's state in one folder, written whole or not at all, read without pickle.

step-000100/
  state.json              step, versions, the optimizer's settings
  recipe.json             what builds the components again (registered names only)
  learner.safetensors     trained parameters, named copies, optimizer moments
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reasonrl.distributed import Solo, World
from reasonrl.errors import CheckpointError
from reasonrl.interfaces import Trainable
from reasonrl.sharding import full, local, split_as
from reasonrl.weights import Weights

FORMAT = 1


def save(
    directory: Path,
    step: int,
    *,
    weights: Mapping[Trainable, Weights],
    optimizer: torch.optim.Optimizer,
    recipe: Mapping[str, Any] | None,
    keep: int,
    world: World | None = None,
) -> Path:
    """Writes `directory/step-<step>` atomically, then removes all but the newest `keep`.

    `step` is the number of finished steps. Raises CheckpointError where the disk refuses; what was saved before stays.
    Every rank calls it and the first writes: whole tensors, so that a run may go on with another number of processes.
    """
    world = world or Solo()
    folder = directory / f"step-{step:06d}"
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(weights, optimizer).items():
        whole = full(tensor)
        if world.rank == 0:
            tensors[name] = whole.cpu()
    with world.agreed():
        if world.rank == 0:
            _write(folder, step, tensors, optimizer, recipe)
            for old in saved(directory)[:-keep]:
                shutil.rmtree(old)
    return folder


def _write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    recipe: Mapping[str, Any] | None,
) -> None:
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / "learner.safetensors")
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state = {"format": FORMAT, "step": step, "torch": torch.__version__, "optimizer": settings}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=1))


def saved(directory: Path) -> list[Path]:
    """Returns the complete checkpoints of a folder, oldest first."""
    found = [p for p in directory.glob("step-*") if _number(p).isdecimal() and (p / "state.json").is_file()]
    return sorted(found, key=lambda path: int(_number(path)))


def _number(folder: Path) -> str:
    return folder.name.removeprefix("step-")


def restore(folder: Path, *, weights: Mapping[Trainable, Weights], optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint's values into a fresh learner, and returns the number of finished steps."""
    state = read_state(folder)
    tensors = _read(folder / "learner.safetensors")
    expected = _tensors(weights, optimizer)
    # A fresh optimizer has no moments yet: only the parameters and copies can be compared.
    fixed = {k for k in expected if not k.startswith("optimizer.")}
    found = {k for k in tensors if not k.startswith("optimizer.")}
    wrong = sorted(fixed ^ found) or sorted(k for k in fixed if expected[k].shape != tensors[k].shape)
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit this recipe: {len(wrong)} weights differ in name or shape, first {wrong[0]};"
            " resume with the recipe it was made with"
        )
    moments = _moments(optimizer, tensors, folder)
    with torch.no_grad():
        for name in fixed:
            local(expected[name]).copy_(local(split_as(tensors[name], expected[name])))
    optimizer.state.clear()
    for parameter, slot, value in moments:
        # AdamW keeps its step count on the CPU in float32, its moments beside the parameter.
        optimizer.state[parameter][slot] = value.clone() if slot == "step" else split_as(value, parameter)
    return int(state["step"])


def load_trained(folder: Path, learning: tuple[Trainable, ...], *, copy: str | None = None) -> None:
    """Puts a checkpoint's trained parameters, or a named copy of them, into the trainables that learned."""
    tensors = _read(folder / "learner.safetensors")
    for index, trainable in enumerate(learning):
        prefix = f"trained.{index}." if copy is None else f"copy.{index}.{copy}."
        mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if mine:
            _fill(trainable, mine, folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Returns state.json; raises CheckpointError for what is no checkpoint of ours."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: state.json cannot be read ({error})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder}/state.json has format {found!r}, this version reads {FORMAT}")
    if type(state.get("step")) is not int:
        raise CheckpointError(
            f"{folder}/state.json has step {state.get('step')!r}, a number of finished steps expected"
        )
    return dict(state)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside the target that takes its place on success and vanishes on failure."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"cannot save {folder}: {reason}; earlier checkpoints are untouched, free some space and --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(weights: Mapping[Trainable, Weights], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns live tensors by name; `copy_` into them restores."""
    out: dict[str, Tensor] = {}
    known: dict[Tensor, str] = {}
    for index, (trainable, copies) in enumerate(weights.items()):
        named = [(n, p) for n, p in trainable.module.named_parameters() if p.requires_grad]
        for (name, parameter), *held in zip(named, *copies.copies.values(), strict=True):
            key = f"trained.{index}.{name}"
            out[key], known[parameter] = parameter.detach(), key
            for label, copy in zip(copies.copies, held, strict=True):
                out[f"copy.{index}.{label}.{name}"] = copy
    for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        if parameter not in known:
            out[f"objective.{place}"] = parameter.detach()
        for slot, value in optimizer.state.get(parameter, {}).items():
            out[f"optimizer.{place}.{slot}"] = torch.as_tensor(value)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _moments(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], folder: Path
) -> list[tuple[Tensor, str, Tensor]]:
    """Returns (parameter, slot, value) of what the optimizer remembers; CheckpointError where it does not fit."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    out = []
    for name in sorted(k for k in tensors if k.startswith("optimizer.")):
        _, place, slot = name.split(".", 2)
        parameter = parameters[int(place)] if place.isdecimal() and int(place) < len(parameters) else None
        expected = torch.Size([]) if slot == "step" else None if parameter is None else parameter.shape
        if parameter is None or tensors[name].shape != expected:
            raise CheckpointError(
                f"{folder} does not fit this recipe: {name} has shape {tuple(tensors[name].shape)},"
                f" expected {'no such parameter' if expected is None else tuple(expected)};"
                " resume with the recipe it was made with"
            )
        out.append((parameter, slot, tensors[name]))
    return out


def _fill(trainable: Trainable, values: Mapping[str, Tensor], folder: Path) -> None:
    named = dict(trainable.module.named_parameters())
    wrong = sorted(n for n in values if n not in named or named[n].shape != values[n].shape)
    if wrong:
        raise CheckpointError(f"{folder} does not fit {type(trainable).__name__}: unknown or misshapen {wrong[0]}")
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path.parent}: {path.name} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is truncated or no safetensors file") from error
