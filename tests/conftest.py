"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: it decides when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

from reasonrl import Judge, Objective, PointwiseJudge, Recipe, Trajectory, hooks
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens
from reasonrl.scenes import nano

PROMPTS = (
    "a red circle left of a blue square",
    "a yellow diamond underneath a blue cross",
    "two green circles and two cyan crosses",
)


class Spread(PointwiseJudge):
    """The length of the reasoning over 100: an untrained policy's rewards differ within a group."""

    def score(self, trajectory: Trajectory) -> float:
        return len(trajectory.reasoning or "") / 100


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bit-identical sums need the same number of threads, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """An untrained nano checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    nano.build(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scene prompts, a line each."""
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text("".join(f"{line}\n" for line in PROMPTS))
    return path


@pytest.fixture(scope="session")
def tiny(nano_folder: Path, prompts_file: Path) -> Callable[..., Recipe]:
    """Builds a recipe of three small steps, each time with weights of its own."""

    def build(judge: Judge | None = None, objective: Objective | None = None, **changes: Any) -> Recipe:
        settings = {
            "prompts": str(prompts_file),
            "steps": 3,
            "prompts_per_step": 2,
            "group_size": 2,
        }
        return Recipe(
            policy=GoTR1(str(nano_folder), guidance=1.0, max_tokens=12),
            renderer=Tokens(),
            judge=judge or Spread(),
            **({} if "objectives" in changes else {"objective": objective or GRPO()}),
            **{**settings, "learning_rate": 1e-3, **changes},
        )

    return build


@pytest.fixture
def watch() -> Iterator[Callable[[object], None]]:
    """Registers an observer for the length of a test."""
    seen: list[object] = []

    def register(observer: object) -> None:
        hooks.manager().register(observer)
        seen.append(observer)

    yield register
    for observer in seen:
        hooks.manager().unregister(observer)
