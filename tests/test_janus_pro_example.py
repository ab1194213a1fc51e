"""The GoT-R1 recipe on Janus-Pro: its settings, its judges, and runs of it on a small checkpoint."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from tests.judges.faulty_server import FaultyServer
from tests.policies.original_janus import OriginalJanus
from tests.policies.published_folder import write_published
from tests.test_examples import example

from reasonrl import EVERY, Plan, PointwiseJudge, Prompt, Recipe, Trajectory
from reasonrl.cli import main
from reasonrl.config import from_record, to_record
from reasonrl.judges import DualStage
from reasonrl.session import run
from reasonrl.types import Stop

COMPBENCH = Path(__file__).parents[2] / "shared" / "data" / "t2i-compbench"
HORSE = "<|obj_start|>brown horse<|obj_end|> <|box_start|>(600,300),(900,700)<|box_end|>"
MAN = "<|obj_start|>a man<|obj_end|> <|box_start|>(100,300),(400,700)<|box_end|>"


class Spread(PointwiseJudge):
    """How much ink the text and the picture have: an untrained policy's rewards differ within a group."""

    needs = frozenset({"image"})

    def score(self, trajectory: Trajectory) -> float:
        assert trajectory.image is not None
        low, high = trajectory.image.convert("L").getextrema()
        return len(set(trajectory.reasoning or "")) / 100 + (high - low) / 1000


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return example("got_r1_janus_pro")


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    return example("got_r1_janus_pro_plans")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return write_published(tmp_path_factory.mktemp("janus") / "published", OriginalJanus().eval())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "spatial_train.txt"
    path.write_text("a horse on the right of a man\na dog next to a cat\n")
    return path


def small(module: ModuleType, prompts: Path, checkpoint: Path, **changes: object) -> Recipe:
    recipe = module.recipe_for(str(prompts), str(checkpoint), changes.pop("judge", module.JUDGE))
    policy = evolve(recipe.policy, max_tokens=6)
    return evolve(
        recipe, policy=policy, **{"steps": 2, "prompts_per_step": 2, "group_size": 2, "num_rows": 3, **changes}
    )


# ---- settings ----


def test_what_the_paper_states_is_what_the_recipe_does(module):
    recipe = module.recipe
    policy, objective = recipe.policy, recipe.objectives[("reasoning", "image")]
    assert (recipe.group_size, recipe.steps, recipe.learning_rate, recipe.schedule) == (16, 1000, 1e-5, "cosine")
    assert (policy.lora_rank, policy.lora_alpha, policy.temperature, policy.guidance) == (32, 32, 1.0, 5.0)
    assert policy.max_tokens == 600 + 1
    assert (objective.scale, objective.kl, objective.clip) == ("std", 0.01, 0.2)
    assert recipe.renderer.source == policy.checkpoint


def test_every_setting_says_who_chose_it(module):
    body = Path(module.__file__).read_text().partition("def recipe_for")[2].partition("\nrecipe = ")[0].splitlines()
    given = ("policy", "renderer", "judge", "prompts")  # by the caller
    seen = set()
    for i, line in enumerate(body):
        setting = re.fullmatch(r"        (\w+)=.*", line)
        if setting is None or setting[1] in given:
            continue
        first = i
        while body[first - 1].strip().startswith("#"):
            first -= 1
        said = " ".join(body[first : i + 1]).lower()
        assert any(who in said for who in ("our choice: ", "# the paper", "the authors' code")), line
        seen.add(setting[1])
    assert {"guidance", "trained", "clip", "kl", "objectives", "prompts_per_step", "max_grad_norm"} <= seen


def test_the_smaller_recipe_shows_as_many_prompts(module):
    smaller, whole = example("got_r1_janus_pro_24gb").recipe, module.recipe
    assert smaller.steps * smaller.prompts_per_step == whole.steps * whole.prompts_per_step
    assert (smaller.group_size, smaller.policy) == (whole.group_size, whole.policy)
    assert smaller.num_rows < whole.num_rows


def test_a_judge_of_every_stage_trains_every_stage(module):
    recipe = module.recipe_for("a.txt", "nano", DualStage("iclr-2026"))
    assert recipe.trained == ("reasoning", "image")
    assert list(recipe.claims) == [("reasoning", "image")]
    only = module.recipe_for("a.txt", "nano", DualStage().on("reasoning"))
    assert only.trained == ("reasoning",)


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_every_prompt_of_the_plans_recipe_is_one_that_its_judge_can_read(plans):
    lines = (COMPBENCH / Path(plans.PROMPTS).name).read_text().splitlines()
    assert len(lines) == 700
    for line in lines:
        [verdict] = plans.JUDGE.judge([Trajectory(Prompt("a", line), (0,), texts={"reasoning": HORSE})])
        assert verdict.scores["PlanGeometry"].value == pytest.approx(0.1), line


# ---- judges ----


def test_the_judge_is_the_papers_and_asks_a_server(module):
    judge = module.recipe.judge
    assert {type(part).__name__ for part in judge.parts} == {"PromptImage", "Semantic", "Spatial", "ReasoningImage"}
    assert module.VLM.coordinates == "pixels"  # Qwen2.5-VL's, told from the name
    assert from_record(to_record(judge)) == judge


def judged(judge: PointwiseJudge, reasoning: str, *, stop=Stop.END):
    prompt = Prompt("a", "a horse on the right of a man")
    return judge.score(Trajectory(prompt, (0,), texts={"reasoning": reasoning}, stop=stop)).value


def test_a_plan_is_well_formed_where_its_objects_have_boxes_and_it_ended(plans):
    judge = plans.WellFormed()
    assert judged(judge, f"{HORSE} {MAN}") == 1.0
    assert judged(judge, f"{HORSE} and <|obj_start|>man<|obj_end|> somewhere.") == 0.5
    assert judged(judge, "no objects at all") == 0.0
    assert judged(judge, f"{HORSE} {MAN}", stop=Stop.LENGTH) == 0.0
    assert Plan.parse(HORSE).objects


# ---- runs ----


def learned(directory: Path, step: int) -> dict[str, torch.Tensor]:
    found = load_file(directory / "checkpoints" / f"step-{step:06d}" / "learner.safetensors")
    return {name: value for name, value in found.items() if name.startswith("trained.")}


def test_both_stages_train_and_a_run_resumes_to_the_same_bits(module, prompts, checkpoint, tmp_path):
    def recipe(steps: int) -> Recipe:
        # The cosine ends with the run: the two runs must agree on its length.
        return small(module, prompts, checkpoint, judge=Spread(), steps=steps, schedule="constant", learning_rate=1e-3)

    run(recipe(2), tmp_path / "whole", quiet=True)
    begin, end = learned(tmp_path / "whole", 0), learned(tmp_path / "whole", 2)
    assert all(".lora_" in name for name in end)
    assert any(not torch.equal(begin[name], end[name]) for name in end)

    run(recipe(1), tmp_path / "parts", quiet=True)
    run(recipe(2), tmp_path / "parts", resume=True, quiet=True)
    again = learned(tmp_path / "parts", 2)
    assert again.keys() == end.keys()
    assert all(torch.equal(again[name], end[name]) for name in end)
    assert (tmp_path / "whole" / "model" / "adapter" / "adapter_model.safetensors").is_file()


def test_plans_that_nobody_can_draw_by_teach_nothing(module, plans, prompts, checkpoint, tmp_path):
    recipe = small(module, prompts, checkpoint, judge=plans.JUDGE, schedule="cosine")
    run(recipe, tmp_path / "run", quiet=True)
    begin, end = learned(tmp_path / "run", 0), learned(tmp_path / "run", 2)
    assert all(torch.equal(begin[name], end[name]) for name in end)


def test_the_command_line_trains_it_and_the_doctor_says_what_is_wrong(
    prompts, checkpoint, tmp_path, monkeypatch, capsys
):
    path = str(Path(__file__).parents[1] / "examples" / "got_r1_janus_pro_plans.py")
    sizes = {"policy.checkpoint": checkpoint, "renderer.source": checkpoint, "prompts": prompts}
    sizes |= {"policy.max_tokens": 6, "group_size": 2, "prompts_per_step": 1, "steps": 1, "num_rows": 2}
    settings = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]

    monkeypatch.setattr("sys.argv", ["reasonrl", "doctor", path, *settings])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1
    healthy = [line for line in said if line.startswith("ok")]
    assert any("2 prompts read" in line for line in healthy)
    assert sum("replayed log-probs differ from sampled ones" in line for line in healthy) == 2
    # A model that was never taught to plan: every reward is 0, and the doctor says so before the money is spent.
    assert [line for line in said if line.startswith("SICK")] == [
        "SICK stage reasoning: 0 of 1 groups have an advantage to learn from"
    ]

    monkeypatch.setattr("sys.argv", ["reasonrl", "train", path, *settings, "--out", str(tmp_path / "run"), "--quiet"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_asks_the_server_that_it_is_told_of_and_writes_down_what_that_cost(
    prompts, checkpoint, tmp_path, monkeypatch, capsys
):
    path = str(Path(__file__).parents[1] / "examples" / "got_r1_janus_pro.py")
    with FaultyServer() as server:
        sizes = {"policy.checkpoint": checkpoint, "renderer.source": checkpoint, "prompts": prompts}
        sizes |= {"policy.max_tokens": 6, "group_size": 2, "prompts_per_step": 2, "steps": 1, "num_rows": 2}
        sizes |= {"judge.vlm.inner.url": server.url, "judge.vlm.folder": tmp_path / "cache"}
        settings = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
        monkeypatch.setattr(
            "sys.argv", ["reasonrl", "train", path, *settings, "--out", str(tmp_path / "run"), "--quiet"]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 0, capsys.readouterr()
    [line] = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["unscored"] == 0
    # Every picture is asked about; an untrained model plans nothing, which costs nothing to judge.
    assert line["cost/PromptImage/calls"] + line.get("cost/PromptImage/hits", 0) == 4
    assert line["cost/PromptImage/tokens_in"] > 0
    assert "<h2>Judging</h2>" in (tmp_path / "run" / "report.html").read_text()


def test_the_plans_recipe_speaks_of_plans_alone(plans):
    assert plans.recipe.judge.stages == {"reasoning"}
    assert not plans.recipe.judge.needs
    assert plans.recipe.trained == ("reasoning",)
    assert EVERY not in plans.recipe.judge.stages
