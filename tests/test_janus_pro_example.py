"""The GoT-R1 recipe on Janus-Pro: its settings, its judges, and runs of it on a small checkpoint."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from tests.policies.original_janus import OriginalJanus
from tests.policies.published_folder import write_published
from tests.test_examples import example

from reasonrl import EVERY, Plan, PointwiseJudge, Prompt, Recipe, Trajectory
from reasonrl.cli import main
from reasonrl.judges import DualStage
from reasonrl.session import run
from reasonrl.types import Stop

COMPBENCH = Path(__file__).parents[2] / "shared" / "data" / "t2i-compbench"
HORSE = "<|obj_start|>brown horse<|obj_end|> <|box_start|>(600,300),(900,700)<|box_end|>"
MAN = "<|obj_start|>a man<|obj_end|> <|box_start|>(100,300),(400,700)<|box_end|>"
LEFT_HORSE = "<|obj_start|>horse<|obj_end|> <|box_start|>(10,300),(90,700)<|box_end|>"


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
    recipe = module.recipe_for(str(prompts), str(checkpoint), changes.pop("judge", None))
    policy = evolve(recipe.policy, max_tokens=6)
    return evolve(
        recipe, policy=policy, **{"steps": 2, "prompts_per_step": 2, "group_size": 2, "num_rows": 3, **changes}
    )


# ---- settings ----


def test_what_the_paper_states_is_what_the_recipe_does(module):
    recipe = module.recipe
    policy, objective = recipe.policy, recipe.objectives[("reasoning",)]
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
    assert module.recipe_for("a.txt", "nano").trained == ("reasoning",)


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_every_default_prompt_is_one_that_the_judge_can_read(module):
    lines = (COMPBENCH / Path(module.PROMPTS).name).read_text().splitlines()
    judge = module.PlannedRelation()
    assert len(lines) == 700
    for line in lines:
        score = judge.score(Trajectory(Prompt("a", line), (0,), texts={"reasoning": ""}))
        assert score.value == 0.0, line


# ---- judges ----


def judged(judge: PointwiseJudge, reasoning: str, *, prompt: str = "a horse on the right of a man", stop=Stop.END):
    return judge.score(Trajectory(Prompt("a", prompt), (0,), texts={"reasoning": reasoning}, stop=stop)).value


@pytest.mark.parametrize(
    ("reasoning", "wanted"),
    [
        (f"A {HORSE} beside {MAN}.", 1.0),
        (f"{LEFT_HORSE} beside {MAN}.", 0.1),
        (f"{HORSE} and {LEFT_HORSE} around {MAN}.", 0.1),  # a horse on either side earns nothing
        (f"A {HORSE} alone.", 0.0),
        (f"A {HORSE} and <|obj_start|>man<|obj_end|> somewhere.", 0.0),
        ("A horse on the right of a man.", 0.0),
    ],
)
def test_the_planned_boxes_must_hold_the_relation(module, reasoning, wanted):
    assert judged(module.PlannedRelation(), reasoning) == wanted


def test_a_prompt_without_a_relation_is_unscored(module):
    assert judged(module.PlannedRelation(), HORSE, prompt="a red bench and a green car") is None


def test_a_sentence_is_read_without_its_verb(module):
    plant = "<|obj_start|>green plant<|obj_end|> <|box_start|>(300,100),(600,400)<|box_end|>"
    stand = "<|obj_start|>white nightstand<|obj_end|> <|box_start|>(300,450),(600,900)<|box_end|>"
    asked = "The green plant was on top of the white nightstand."
    assert judged(module.PlannedRelation(), f"{plant} {stand}", prompt=asked) == 1.0


def test_a_plan_is_well_formed_where_its_objects_have_boxes_and_it_ended(module):
    judge = module.WellFormed()
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


def test_plans_that_nobody_can_draw_by_teach_nothing(module, prompts, checkpoint, tmp_path):
    run(small(module, prompts, checkpoint, schedule="cosine"), tmp_path / "run", quiet=True)
    begin, end = learned(tmp_path / "run", 0), learned(tmp_path / "run", 2)
    assert all(torch.equal(begin[name], end[name]) for name in end)


def test_the_command_line_trains_it_and_the_doctor_says_what_is_wrong(
    prompts, checkpoint, tmp_path, monkeypatch, capsys
):
    path = str(Path(__file__).parents[1] / "examples" / "got_r1_janus_pro.py")
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


def test_the_stand_in_speaks_of_plans_alone(module):
    assert module.recipe.judge.stages == {"reasoning"}
    assert not module.recipe.judge.needs
    assert EVERY not in module.recipe.judge.stages
