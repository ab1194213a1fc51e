"""The records of a run's folder: recipe.json, what is run, and run.json, what ran where."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from reasonrl import __version__
from reasonrl.config import from_record, to_record
from reasonrl.distributed import World
from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.recipe import Recipe

ROOTS = {"recipe": Recipe}


def check_folder(directory: Path, *, resume: bool) -> None:
    """Raises ConfigError for a folder that a new run may not fill, or that holds no run to resume; writes nothing."""
    if resume and not (directory / "recipe.json").is_file():
        raise ConfigError(f"{directory} holds no run to resume: give the folder that `reasonrl train` printed")
    try:
        taken = not resume and directory.exists() and any(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}") from error
    if taken:
        raise ConfigError(f"{directory} is not empty: use --resume to go on with it, or --out for another folder")


def begin(directory: Path, recipe: Recipe, *, command: str, world: World) -> None:
    """Makes the folder of a new run and its records; raises CheckpointError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}") from error
    write_json(directory / "recipe.json", to_record(recipe, roots=ROOTS))
    write_json(directory / "run.json", about(command, world))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns in which fields two records of a recipe differ, a line each."""
    now = json.loads(json.dumps(now))
    shown = [{name: json.dumps(value) for name, value in record.items()} for record in (before, now)]
    return [
        f"{name} is {shown[1].get(name, 'the default')}, was {shown[0].get(name, 'the default')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file whole or not at all."""
    try:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1))
        new.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def about(command: str, world: World) -> dict[str, str]:
    """Returns what ran where: versions, machine, command."""
    return {
        "reasonrl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "processes": str(world.size),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
    }


def read_recipe(path: Path) -> Recipe:
    """Returns the recipe that a recipe.json describes; it may construct registered names only."""
    recipe = from_record(read_json(path), roots=ROOTS)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} describes a {type(recipe).__name__}, not a recipe")
    return recipe


def read_json(path: Path) -> dict[str, Any]:
    """Returns a record; raises CheckpointError for what is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, not a recipe's record")
    return record
