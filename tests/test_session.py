import errno
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from reasonrl import PointwiseJudge, Recipe, Trajectory
from reasonrl.errors import CheckpointError, ConfigError, JudgeError, ReasonRLError
from reasonrl.hooks import hookimpl
from reasonrl.judges import ScenePromptImage, SceneSemantic
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.session import Interrupted, run

STEPS = 6
Tiny = Callable[..., Recipe]
Watch = Callable[[object], None]


class Faulty(PointwiseJudge):
    """Scores the length of the reasoning, as the fixture's judge does, until told to fail."""

    def __init__(self, calls_before_failure: int) -> None:
        self.left = calls_before_failure

    def score(self, trajectory: Trajectory) -> float:
        if self.left == 0:
            raise RuntimeError("out of credit\nsee the bill")
        self.left -= 1
        return len(trajectory.reasoning or "") / 100


class CtrlC:
    """Presses Ctrl-C during a step, once its trajectories are judged."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    @hookimpl
    def rollout_end(self, step: int) -> None:
        while step == self.step and self.times:
            self.times -= 1
            os.kill(os.getpid(), signal.SIGINT)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(directory: Path) -> list[int]:
    return [line["step"] for line in lines(directory / "metrics.jsonl")]


def digest(path: Path) -> str:
    """The sha256 of a safetensors file's names and tensor bytes."""
    found = hashlib.sha256()
    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            found.update(name.encode() + file.get_tensor(name).tobytes())
    return found.hexdigest()


def weights(directory: Path, finished: int = STEPS) -> tuple[str, str]:
    learner = directory / "checkpoints" / f"step-{finished:06d}" / "learner.safetensors"
    return digest(learner), digest(directory / "model" / "model.safetensors")


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def straight(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    run(tiny(steps=STEPS), directory, quiet=True)
    return directory


@pytest.fixture(scope="module")
def straight_kl(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a reference that a resumed run must find again."""
    directory = tmp_path_factory.mktemp("straight_kl") / "run"
    run(tiny(objective=GRPO(kl=0.1), steps=STEPS), directory, quiet=True)
    return directory


# ---- stopped and resumed ----


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_run_that_ctrl_c_stopped_resumes_to_the_same_bits(
    tiny: Tiny, watch: Watch, tmp_path: Path, request: pytest.FixtureRequest, kl: float
) -> None:
    uninterrupted = request.getfixturevalue("straight_kl" if kl else "straight")
    stop = random.randrange(STEPS)
    print(f"stopped during step {stop}")
    watch(CtrlC(stop))
    directory = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run(tiny(objective=GRPO(kl=kl), steps=STEPS), directory)
    said = one_line(caught.value)
    assert f"step {stop}" in said
    assert f"reasonrl train --resume {directory}" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert steps(directory) == list(range(stop + 1))
    assert (directory / "checkpoints" / f"step-{stop + 1:06d}" / "state.json").is_file()

    run(tiny(objective=GRPO(kl=kl), steps=STEPS), directory, resume=True, quiet=True)
    assert steps(directory) == list(range(STEPS))
    assert weights(directory) == weights(uninterrupted)


def test_training_moves_the_weights_so_that_equal_bits_mean_something(
    straight: Path, straight_kl: Path, nano_folder: Path
) -> None:
    start = digest(nano_folder / "model.safetensors")
    assert len({start, weights(straight)[1], weights(straight_kl)[1]}) == 3


def test_a_second_ctrl_c_stops_at_once_and_costs_only_steps_after_the_last_checkpoint(
    tiny: Tiny, watch: Watch, straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    watch(CtrlC(3, times=2))
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tiny(steps=STEPS, save_every=2), directory)
    assert not isinstance(caught.value, Interrupted)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert steps(directory) == [0, 1, 2]  # step 2 is written down, but saved is only up to step 1
    # What a kill leaves: a line cut short, here in the middle of a number.
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (directory / name).open("a") as file:
            file.write('{"step": 3, "seconds": 0.2')

    run(tiny(steps=STEPS, save_every=2), directory, resume=True, quiet=True)
    assert steps(directory) == list(range(STEPS))
    shown = [(s["step"], s["prompt_id"]) for s in lines(directory / "samples.jsonl")]
    assert len(shown) == len(set(shown))
    assert weights(directory) == weights(straight)


def test_a_run_resumes_with_lines_cut_inside_a_step_number(tiny: Tiny, straight: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    run(tiny(steps=STEPS), directory, resume=True, quiet=True)
    assert steps(directory) == list(range(STEPS))
    assert weights(directory) == weights(straight)


def test_a_judge_that_crashes_is_named_and_the_finished_steps_are_saved(
    tiny: Tiny, straight: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    with pytest.raises(JudgeError) as caught:
        run(tiny(Faulty(3 * 4 + 1), steps=STEPS), directory, quiet=True)  # 4 trajectories a step
    said = str(caught.value)
    assert "judge Faulty of package" in said
    assert "test_session (not an installed package)" in said
    assert "RuntimeError: out of credit" in said
    assert [p.name for p in (directory / "checkpoints").iterdir() if p.name > "step-000000"] == ["step-000003"]
    run(tiny(steps=STEPS), directory, resume=True, quiet=True)
    assert steps(directory) == list(range(STEPS))
    assert weights(directory) == weights(straight)


def test_what_a_judge_raised_is_reported_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(JudgeError) as caught:
        run(tiny(Faulty(0)), tmp_path / "run", quiet=True)
    assert "see the bill" in one_line(caught.value)


def test_a_component_that_raises_any_error_leaves_the_finished_steps_saved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, calls = GoTR1.sample, []

    def out_of_memory(self: GoTR1, *args: Any, **settings: Any) -> list[Trajectory]:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        return sample(self, *args, **settings)

    monkeypatch.setattr(GoTR1, "sample", out_of_memory)
    with pytest.raises((MemoryError, ReasonRLError)):
        run(tiny(), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").is_file()


def test_a_finished_run_goes_on_with_more_steps_to_the_same_bits(tiny: Tiny, straight: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(tiny(steps=STEPS - 1), directory, quiet=True)
    run(tiny(steps=STEPS), directory, resume=True, quiet=True)
    assert weights(directory) == weights(straight)
    assert (directory / "recipe.json").read_text() == (straight / "recipe.json").read_text()
    with pytest.raises(ConfigError, match=f"has finished {STEPS} steps, more than steps={STEPS - 1}"):
        run(tiny(steps=STEPS - 1), directory, resume=True, quiet=True)


def test_what_a_resumed_recipe_changed_is_said_and_written_down(
    tiny: Tiny, straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    run(tiny(objective=GRPO(clip=0.1), steps=STEPS + 1), directory, resume=True)
    change = f"steps is {STEPS + 1}, was {STEPS}"
    assert f"from step {STEPS} on, {change}" in capfd.readouterr().err
    [said] = json.loads((directory / "run.json").read_text())["changed"].values()
    assert said[0].startswith("objective is ")
    assert '"clip": 0.1' in said[0]
    assert said[1:] == [change]
    assert json.loads((directory / "recipe.json").read_text())["steps"] == STEPS + 1
    facts = (directory / "run.json").read_bytes()
    run(tiny(objective=GRPO(clip=0.1), steps=STEPS + 1), directory, resume=True, quiet=True)
    assert (directory / "run.json").read_bytes() == facts


def test_a_disk_that_is_full_for_the_final_model_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: GoTR1, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = tmp_path / "run"
    with monkeypatch.context() as full:
        full.setattr(GoTR1, "save", refuse)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            run(tiny(steps=1), directory, quiet=True)
    assert "model" in one_line(caught.value)
    run(tiny(steps=1), directory, resume=True, quiet=True)
    assert steps(directory) == [0]
    assert (directory / "model" / "model.safetensors").is_file()


# ---- what is refused before anything is written ----


def test_a_folder_that_holds_something_is_refused_and_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: use --resume") as caught:
        run(tiny(), tmp_path, quiet=True)
    assert str(tmp_path) in one_line(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_where_the_run_should_go_is_refused_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ReasonRLError) as caught:
        run(tiny(), tmp_path / "thesis.txt", quiet=True)
    assert "thesis.txt" in one_line(caught.value)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_resuming_a_folder_without_a_run_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no run to resume") as caught:
            run(tiny(), folder, resume=True, quiet=True)
        assert str(folder) in one_line(caught.value)
    assert not list(tmp_path.iterdir())


def test_resuming_a_run_without_a_checkpoint_says_so(tiny: Tiny, straight: Path, tmp_path: Path) -> None:
    shutil.copy(straight / "recipe.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint") as caught:
        run(tiny(), tmp_path, resume=True, quiet=True)
    one_line(caught.value)


def test_test_prompts_that_cannot_be_read_are_refused_before_training(tiny: Tiny, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("a red circle\na chartreuse zeppelin\n")
    with pytest.raises(ReasonRLError, match=r"bad:2 .*'chartreuse', 'zeppelin'"):
        run(tiny(tests={"test": str(bad)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# ---- what a run writes ----


def test_each_test_prompt_is_evaluated_before_and_after_once_even_when_resumed(
    tiny: Tiny, watch: Watch, prompts_file: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"

    def recipe() -> Recipe:
        return tiny(SceneSemantic(), tests={"test": str(prompts_file)}, test_judge=ScenePromptImage())

    def evaluated() -> list[tuple[int, str, str]]:
        found = lines(directory / "evaluations.jsonl")
        assert all(isinstance(line["exact"], bool) for line in found)
        assert all(set(line["scores"]) == {"ScenePromptImage"} for line in found)
        assert all((directory / line["image"]).is_file() for line in found)
        return [(line["step"], line["split"], line["prompt_id"]) for line in found]

    before = [(0, "test", f"mine:{i}") for i in (1, 2, 3)]
    watch(CtrlC(1))
    with pytest.raises(Interrupted):
        run(recipe(), directory, quiet=True)
    assert evaluated() == before
    for _ in range(2):  # the second time there is nothing left to train
        run(recipe(), directory, resume=True, quiet=True)
        assert evaluated() == before + [(3, "test", f"mine:{i}") for i in (1, 2, 3)]


def test_a_run_of_my_prompts_trains_on_them_and_leaves_a_model_and_a_report(tiny: Tiny, tmp_path: Path) -> None:
    mine = tmp_path / "scenes.txt"
    mine.write_text("# mine\na red circle\n\na blue square on top of a green cross\n")
    page = run(tiny(prompts=str(mine), show_every=1), tmp_path / "run", quiet=True)
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert {s["prompt_id"] for s in samples} == {"scenes:2", "scenes:4"}
    assert {s["step"] for s in samples} == {0, 1, 2}
    assert all((tmp_path / "run" / s["image"]).is_file() for s in samples)
    assert page == tmp_path / "run" / "report.html"
    assert "<html" in page.read_text()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_only_the_newest_checkpoints_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(save_every=1, keep=2), tmp_path / "run", quiet=True)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]


def test_metrics_of_a_judge_on_one_stage_are_of_that_stage(tiny: Tiny, tmp_path: Path) -> None:
    judge = SceneSemantic().on("reasoning")
    recipe = tiny(judge, objectives={"reasoning": GRPO()}, steps=1)
    run(recipe, tmp_path / "run", quiet=True)
    [line] = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["unscored"] == 0.0  # nobody was asked about the image, so nobody abstained
    assert line["reward"] is not None
