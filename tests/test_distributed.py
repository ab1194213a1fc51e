"""Two processes learn what one learns: replicas and FSDP2, over gloo on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file
from tests.two_processes import CHANGES, STEPS, build, case, forked, recipe, whole_run
from torch import Tensor

from reasonrl.checkpoint import saved
from reasonrl.distributed import Solo, launched, part_of, sum_metrics
from reasonrl.errors import ConfigError
from reasonrl.session import run

ROOT = Path(__file__).parents[1]
LEARNED = [
    *("plain", "updates", "idle", "shy", "parts", "lora", "heads"),
    *("plain/sharded", "updates/sharded", "idle/sharded", "shy/sharded", "lora/sharded", "heads/sharded"),
    "recomputed/sharded",
]
OTHERS = ["collectives", "forked", "mixed", "blind", "failed", "stopped", "resumed"]
LOSS, WEIGHT = 5e-6, 1e-6
"""Largest absolute differences; losses are of order 1, and weights move by 1e-4 to 3e-3."""


def environment(**more: str) -> dict[str, str]:
    without = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**without, **here, **more}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def started(folder: Path, size: int, names: list[str]) -> list[subprocess.Popen[str]]:
    """Starts the processes as torchrun would, on this machine."""
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    command = [sys.executable, "-m", "tests.two_processes", str(folder), *names]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]


@frozen
class Found:
    """What the processes left in a folder."""

    folder: Path

    def of(self, name: str, *, size: int = 2) -> list[dict[str, Any]]:
        """Returns a case's answer by rank."""
        return [torch.load(self.folder / f"{name.replace('/', '-')}-{size}-{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two processes that ran every case, and one that ran the plain ones."""
    folder = tmp_path_factory.mktemp("ranks")
    build(folder)
    finish(started(folder, 2, [*LEARNED, *OTHERS]))
    finish(started(folder, 1, ["plain", "plain/sharded"]))
    return Found(folder)


@pytest.fixture(scope="module")
def alone(found: Found) -> dict[str, dict[str, Any]]:
    """The same recipes learned by this process."""
    names = dict.fromkeys(name.partition("/")[0] for name in LEARNED)
    return {name: case(found.folder, name, Solo()) for name in names}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- learning ----


@pytest.mark.parametrize("name", LEARNED)
def test_two_processes_learn_what_one_learns(name: str, found: Found, alone: dict[str, dict[str, Any]]) -> None:
    expected = alone[name.partition("/")[0]]
    for rank in found.of(name):
        assert len(rank["lines"]) == len(expected["lines"]) >= 2
        for line, wanted in zip(rank["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(wanted, abs=LOSS)
        assert furthest(rank["weights"], expected["weights"]) < WEIGHT


@pytest.mark.parametrize("name", LEARNED)
def test_ranks_hold_the_same_weights_to_the_bit(name: str, found: Found) -> None:
    one, other = found.of(name)
    assert furthest(one["weights"], other["weights"]) == 0
    assert one["lines"] == other["lines"]


def test_the_weights_move_further_than_the_tolerance(found: Found, alone: dict[str, dict[str, Any]]) -> None:
    for name, learned in alone.items():
        asked = recipe(found.folder, **CHANGES[name])
        start = {n: p.detach() for n, p in asked.policy.module.named_parameters() if p.requires_grad}
        assert furthest(learned["weights"], start) > 100 * WEIGHT
        assert learned["lines"][-1]["reasoning/kl"] > 100 * LOSS


@pytest.mark.parametrize("name", ["plain", "plain/sharded"])
def test_a_world_of_one_is_solo_to_the_bit(name: str, found: Found, alone: dict[str, dict[str, Any]]) -> None:
    (one,) = found.of(name, size=1)
    assert one["lines"] == alone["plain"]["lines"]
    assert furthest(one["weights"], alone["plain"]["weights"]) == 0


# ---- what is asked of the others ----


def test_sums_gathers_and_maxima_are_of_all_ranks(found: Found) -> None:
    for rank in found.of("collectives"):
        assert rank["sum"].tolist() == [3, 20]
        assert rank["max"] == 5
        assert rank["gather"] == [0, "0", 1]
        assert rank["placed"].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # the first rank's weights


def test_a_gradient_that_is_missing_on_a_rank_counts_as_zero_and_everywhere_stays_missing(found: Found) -> None:
    for rank in found.of("collectives"):
        here, there, nowhere, half = rank["gradients"]
        assert (here.tolist(), there.tolist(), half.tolist()) == ([1.0] * 3, [2.0] * 3, [4.0] * 3)
        assert nowhere is None
        assert rank["norm"] == pytest.approx(15**0.5)
        assert rank["clipped"] == pytest.approx(1.0)
        assert rank["norm of nothing"] == 0


def test_what_fails_on_one_rank_fails_on_all_with_its_name(found: Found) -> None:
    assert [rank["said"] for rank in found.of("collectives")] == ["RankError: rank 1: ValueError: no such file"] * 2


def test_solo_and_parts_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Solo()
    assert (world.max(3), world.gather([1, 2]), world.sum(torch.tensor(4))) == (3, [1, 2], torch.tensor(4))
    items = list(range(5))
    parts = [part_of(items, Solo(rank=rank, size=3)) for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4]]
    assert [len(part_of([1], Solo(rank=rank, size=3))) for rank in range(3)] == [1, 0, 0]
    sums = sum_metrics({"a": torch.tensor(1.5)}, world)
    assert sums == {"a": torch.tensor(1.5)}
    assert launched() == Solo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="asked for several processes and started one"):
        launched()


# ---- split modules ----


def test_gradients_of_heads_that_ranks_use_differently_are_those_of_one_process(found: Found) -> None:
    expected = forked(found.folder, Solo())
    for rank in found.of("forked"):
        assert rank["gradients"]["heads.c"] is expected["gradients"]["heads.c"] is None
        for name in rank["gradients"].keys() - {"heads.c"}:
            assert torch.allclose(rank["gradients"][name], expected["gradients"][name], atol=1e-6)
        assert rank["norm"] == pytest.approx(expected["norm"].item(), rel=1e-6)


def test_a_split_root_is_split_again_after_a_forward_without_gradient(found: Found) -> None:
    # It would keep the weights of that forward: with KL, the reference's in the place of the learner's.
    assert all(rank["root stays split"] for rank in found.of("forked"))


def test_a_split_module_is_whole_for_a_while(found: Found) -> None:
    for rank in found.of("forked"):
        assert rank["whole inside"]
        assert rank["the same objects after"]


def test_frozen_bfloat16_beside_trained_float32_is_split_and_two_trained_dtypes_are_refused(found: Found) -> None:
    for rank in found.of("mixed"):
        assert rank["said"].startswith(
            "sharded=True needs one dtype for what learns in a block, got blocks.1.weight in"
        )
        assert torch.equal(rank["gradient"], found.of("mixed")[0]["gradient"])
        assert rank["gradient"].abs().max() > 0.1


# ---- runs ----


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = ("seconds", "tokens_per_s", "judge_s", "judge_hidden_frac")


def same_lines(one: Path, other: Path, *, without: tuple[str, ...] = TIMES) -> None:
    got, wanted = lines(one), lines(other)
    assert len(got) == len(wanted)
    for line, expected in zip(got, wanted, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - set(without):
            same = pytest.approx(expected[name], abs=LOSS) if isinstance(expected[name], float) else expected[name]
            assert line[name] == same, name


@pytest.fixture(scope="module")
def straight(found: Found) -> Path:
    """The run of one process that nothing stopped."""
    run(whole_run(found.folder), found.folder / "straight", quiet=True, world=Solo())
    return found.folder / "straight"


def same_runs(one: Path, other: Path) -> None:
    """The journals, the checkpoints and the models of two runs agree."""
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        same_lines(one / name, other / name)
    pictures = sorted(p.relative_to(other) for p in other.rglob("*.png"))
    assert pictures
    assert pictures == sorted(p.relative_to(one) for p in one.rglob("*.png"))
    for file in (f"checkpoints/step-{STEPS:06d}/learner.safetensors", "model/model.safetensors"):
        got, wanted = load_file(one / file), load_file(other / file)
        # AdamW as it comes: it steps by the sign of a gradient, which float noise may turn where it is near 0.
        distance = sum(float((got[n].double() - wanted[n].double()).square().sum()) for n in wanted) ** 0.5
        length = sum(float(wanted[n].double().square().sum()) for n in wanted) ** 0.5
        assert got.keys() == wanted.keys()
        assert distance < 1e-5 * length, file
    assert (one / "report.html").is_file()


def test_ctrl_c_in_one_process_stops_all_after_the_step_and_saves(found: Found) -> None:
    said = [rank["said"] for rank in found.of("stopped")]
    assert said == [f"stopped after step 1, saved. Go on with: reasonrl train --resume {found.folder}/stopped-0"] * 2
    assert [p.name for p in saved(found.folder / "stopped-0" / "checkpoints")] == ["step-000000", "step-000002"]
    assert not (found.folder / "stopped-1").exists()
    assert json.loads((found.folder / "stopped-0" / "run.json").read_text())["processes"] == "2"


def test_two_processes_resume_a_split_run_to_what_one_process_does(found: Found, straight: Path) -> None:
    assert [rank["page"] for rank in found.of("resumed")] == [str(found.folder / "resumed" / "report.html")] * 2
    same_runs(found.folder / "resumed", straight)


def test_one_process_resumes_what_two_began(found: Found, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(found.folder / "stopped-0", tmp_path / "run")
    run(whole_run(found.folder), tmp_path / "run", resume=True, quiet=True, world=Solo())
    same_runs(tmp_path / "run", straight)


def test_a_judge_that_fails_on_one_rank_stops_all_and_finished_steps_are_saved(found: Found) -> None:
    for rank in found.of("failed"):
        assert rank["said"].startswith("RankError: rank 1: JudgeError: judge Failing of package")
        assert rank["said"].endswith("raised RuntimeError: out of credit")
    assert [p.name for p in saved(found.folder / "failed" / "checkpoints")] == ["step-000000", "step-000001"]


def test_max_unscored_is_of_the_whole_step(found: Found) -> None:
    for rank in found.of("blind"):  # a third is unscored, all of it the second rank's: 0.5 lets it pass, 0.3 does not
        assert rank["said"] == [
            "RankError: rank 0: JudgeError: step 0: 33% of trajectories are unscored, more than max_unscored=0.3:"
            " Shy: shy (2x)"
        ]


RECIPE = """
import reasonrl as rl
from reasonrl.judges import SceneSemantic
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

recipe = rl.Recipe(
    policy=GoTR1({nano!r}, guidance=1.0, max_tokens=12),
    renderer=Tokens(),
    judge=SceneSemantic(),
    objective=GRPO(kl=0.1),
    prompts={prompts!r},
    steps=2,
    prompts_per_step=3,
    group_size=2,
)
"""


def test_the_command_line_under_accelerate_launch(found: Found, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE.format(nano=str(found.folder / "nano"), prompts=str(found.folder / "three.txt")))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    train_it = ["-m", "reasonrl.cli", "train", str(path), "--set", "sharded=True", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *train_it],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run: ") == done.stdout.count("report: ") == 1
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == "2"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# ---- environments that no launcher made ----


@pytest.mark.parametrize("size", ["WORLD_SIZE", "PMI_SIZE"])
def test_a_job_system_that_sets_a_size_of_1_is_one_process(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.run(
        [sys.executable, "-c", "from reasonrl.distributed import launched; print(type(launched()).__name__)"],
        env=environment(**{size: "1", "RANK": "0"}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "Solo"


def test_a_size_without_a_meeting_place_is_refused_in_one_line() -> None:
    code = (
        "from reasonrl.distributed import launched\n"
        "try: launched()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith("ConfigError the environment says {'WORLD_SIZE': '1'")
    assert len(said.stdout.splitlines()) == 1


def test_an_objective_of_whole_groups_is_refused_where_groups_may_be_torn() -> None:
    import reasonrl as rl
    from reasonrl.loop import Learner
    from reasonrl.objectives import GRPO
    from reasonrl.policies import GoTR1

    @frozen
    class Coupled(rl.Objective):
        whole_groups = True

        def advantages(self, rewards: Any) -> Any:
            return GRPO().advantages(rewards)

        def loss(self, stage: Any, replay: Any, frozen: Any) -> Any:
            raise NotImplementedError

    @frozen
    class Two(Solo):
        size: int = 2

    torn = rl.Recipe(policy=GoTR1(), objective=Coupled(), group_by=lambda prompt_id, member: 0)
    with pytest.raises(ConfigError, match="Coupled needs whole groups, and group_by may join prompts"):
        Learner.of(torn, Two())
