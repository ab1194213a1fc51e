import errno
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from reasonrl import checkpoint
from reasonrl.errors import CheckpointError
from reasonrl.interfaces import Trainable
from reasonrl.weights import Weights

NAMES = {"learner.safetensors", "recipe.json", "state.json"}


@define(eq=False)
class Owner:
    """What a checkpoint asks of a trainable: its module."""

    module: nn.Module = field(factory=lambda: nn.Linear(4, 3))


@define(eq=False)
class State:
    """A learner with moments, and a reference that differs from the live weights."""

    owner: Any
    weights: dict[Any, Weights]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, module: nn.Module, *, num_updates: int = 2) -> "State":
        owner = Owner(module)
        weights = Weights(owner, {"reference": lambda step: 1.0})
        optimizer = torch.optim.AdamW(weights.live, lr=0.1)
        for _ in range(num_updates):
            sum(p.square().sum() for p in weights.live).backward()
            optimizer.step()
            optimizer.zero_grad()
        return cls(owner, {owner: weights}, optimizer)

    def save(self, directory: Path, step: int, *, keep: int = 2) -> Path:
        return checkpoint.save(directory, step, weights=self.weights, optimizer=self.optimizer, recipe=None, keep=keep)

    def restore(self, folder: Path) -> int:
        return checkpoint.restore(folder, weights=self.weights, optimizer=self.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in checkpoint._tensors(self.weights, self.optimizer).items()}


def refused(state: State, folder: Path, *, naming: str) -> str:
    """The refusal, in one line, of a restore that changes no weight."""
    before = state.tensors()
    with pytest.raises(CheckpointError) as caught:
        state.restore(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert naming in message
    assert all(torch.equal(v, before[k]) for k, v in state.tensors().items())
    return message


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Files of this process can grow to so many bytes only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return State.of(nn.Linear(4, 3)).save(tmp_path / "checkpoints", 2)


# ---- whole or not at all ----


def write(folder: Path, text: str, error: BaseException | type[BaseException] | None = None) -> None:
    with checkpoint.atomic_folder(folder) as partial:
        (partial / "file").write_text(text)
        if error is not None:
            raise error


def test_a_failing_writer_leaves_no_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(tmp_path / "step-000001", "half", full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_any_other_error_passes_through_and_leaves_nothing_either(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write(tmp_path / "step-000001", "half", error)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_folder_of_before(tmp_path: Path) -> None:
    write(tmp_path / "one", "old")
    with pytest.raises(CheckpointError):
        write(tmp_path / "one", "new", OSError("the cable is out"))
    assert (tmp_path / "one" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        State.of(nn.Linear(4, 3)).save(tmp_path / "file" / "checkpoints", 1)
    assert str(tmp_path / "file" / "checkpoints" / "step-000001") in str(caught.value)


def test_a_folder_without_state_is_no_checkpoint(saved: Path) -> None:
    (saved.parent / "step-000009").mkdir()  # a kill between two writes of an older version
    assert checkpoint.saved(saved.parent) == [saved]


# ---- a full disk ----


@pytest.mark.parametrize("num_bytes", [0, 100])
def test_a_disk_that_fills_during_a_save_keeps_the_earlier_checkpoint(tmp_path: Path, num_bytes: int) -> None:
    state = State.of(nn.Linear(64, 64))
    earlier, before = state.save(tmp_path, 1, keep=1), state.tensors()
    with pytest.raises(CheckpointError) as caught, full_disk(num_bytes):
        state.save(tmp_path, 2, keep=1)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "step-000002") in message
    assert "earlier checkpoints are untouched" in message
    assert list(tmp_path.iterdir()) == [earlier]
    fresh = State.of(nn.Linear(64, 64), num_updates=0)
    assert fresh.restore(earlier) == 1
    assert all(torch.equal(v, before[k]) for k, v in fresh.tensors().items())


def test_a_full_disk_during_the_small_files_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State.of(nn.Linear(4, 3))
    earlier = state.save(tmp_path, 1)

    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            state.save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [earlier]
    assert state.save(tmp_path, 2).is_dir()  # some space was freed


# ---- what comes back ----


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 5), num_updates=st.integers(0, 3))
def test_a_restored_learner_equals_the_saved_one_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, num_updates: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = State.of(nn.Linear(width, 2), num_updates=num_updates)
        fresh = State.of(nn.Linear(width, 2), num_updates=0)
    folder = state.save(tmp_path_factory.mktemp("run"), num_updates)
    assert fresh.restore(folder) == num_updates
    wanted = state.tensors()
    assert fresh.tensors().keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in fresh.tensors().items())


def test_a_checkpoint_holds_json_and_safetensors_and_no_pickle(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == NAMES
    json.loads((saved / "state.json").read_text())
    assert load_file(saved / "learner.safetensors")


def test_checkpoints_are_listed_oldest_first_beyond_a_million_steps(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999, 2):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    names = [p.name for p in checkpoint.saved(tmp_path)]
    assert names == ["step-000002", "step-999999", "step-1000000"]


# ---- what is refused ----


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_truncated_weights_are_refused_by_name(saved: Path, kept: float) -> None:
    path = saved / "learner.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    refused(State.of(nn.Linear(4, 3)), saved, naming="learner.safetensors")


def test_missing_weights_are_refused_by_name(saved: Path) -> None:
    (saved / "learner.safetensors").unlink()
    refused(State.of(nn.Linear(4, 3)), saved, naming="learner.safetensors is missing")


def test_weights_of_something_else_are_refused(saved: Path) -> None:
    save_file({"unet.conv.weight": torch.zeros(2)}, saved / "learner.safetensors")
    message = refused(State.of(nn.Linear(4, 3)), saved, naming="does not fit this recipe")
    assert "5 weights differ" in message  # two weights, their two references, and the stranger


@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Linear(4, 3, bias=False), nn.PReLU()])
def test_a_checkpoint_of_other_shapes_is_refused_and_nothing_is_overwritten(saved: Path, module: nn.Module) -> None:
    message = refused(State.of(module), saved, naming="does not fit this recipe")
    assert "resume with the recipe it was made with" in message


def test_a_missing_state_is_refused_by_name(saved: Path) -> None:
    (saved / "state.json").unlink()
    refused(State.of(nn.Linear(4, 3)), saved, naming="state.json cannot be read")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 2, "step": 2}', '{"format": 1}', "\udcff\udcfe"],
)
def test_a_state_that_is_not_ours_is_refused_by_name(saved: Path, text: str) -> None:
    (saved / "state.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(State.of(nn.Linear(4, 3)), saved, naming="state.json")


def test_another_format_names_both_numbers(saved: Path) -> None:
    (saved / "state.json").write_text('{"format": 7, "step": 2}')
    message = refused(State.of(nn.Linear(4, 3)), saved, naming="state.json")
    assert re.search(r"format 7\b.* reads 1\b", message)


@pytest.mark.parametrize("slot", ["optimizer.0.exp_avg", "optimizer.9.exp_avg", "optimizer.0.step"])
def test_moments_that_do_not_fit_are_refused(saved: Path, slot: str) -> None:
    tensors = load_file(saved / "learner.safetensors")
    save_file({**tensors, slot: torch.zeros(7)}, saved / "learner.safetensors")
    refused(State.of(nn.Linear(4, 3)), saved, naming=slot)


def test_sampling_refuses_a_checkpoint_of_another_policy(saved: Path) -> None:
    other: tuple[Trainable, ...] = (State.of(nn.Linear(5, 3)).owner,)
    with pytest.raises(CheckpointError, match="does not fit Owner") as caught:
        checkpoint.load_trained(saved, other)
    assert str(saved) in str(caught.value)
