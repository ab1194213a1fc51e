"""Each example runs: its own code, at a size that takes seconds."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from reasonrl import Draw, Recipe, Score, Verdict, train
from reasonrl.cli import loaded
from reasonrl.interfaces import Judge
from reasonrl.policies import GoTR1
from reasonrl.rollout import draw_trajectories, rollouts
from reasonrl.session import run

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "tests": {}}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["got_r1_nano", "shuffled_control"])
def test_a_recipe_trains_a_step(name, tmp_path):
    report = run(evolve(example(name).recipe, **SMALL), tmp_path / "run", quiet=True)
    assert report.is_file()


@pytest.mark.parametrize(("train", "free"), [("plan", False), ("image", False), ("both", False), ("image", True)])
def test_the_diffusion_recipe_trains_what_it_names_and_is_sampled_from(train, free, tmp_path):
    diffusion = example("got_r1_diffusion_nano")
    recipe = evolve(diffusion.recipe_for(train, likelihood_free=free), **{**SMALL, "group_size": 6})
    before = [[p.detach().clone() for p in t.module.parameters()] for t in recipe.trainables]
    assert run(recipe, tmp_path / "run", quiet=True).is_file()
    moved = [
        any(not torch.equal(old, new) for old, new in zip(weights, t.module.parameters(), strict=True))
        for weights, t in zip(before, recipe.trainables, strict=True)
    ]
    assert moved == [train != "image", train != "plan"]
    assert (tmp_path / "run" / "renderer").is_dir() == (train != "plan")
    policy, renderer = loaded(str(tmp_path / "run"))
    (drawn,) = draw_trajectories(policy, renderer, recipe.read()[:1], group_size=1, draw=Draw(0, 0))
    (again,) = draw_trajectories(recipe.policy, recipe.test_renderer, recipe.read()[:1], group_size=1, draw=Draw(0, 0))
    assert drawn.reasoning == again.reasoning
    assert drawn.image.tobytes() == again.image.tobytes()


def test_recipes_of_one_process_do_not_share_what_they_train():
    for name, first, second in (("denoising_recipes", "flow-grpo", "cps"), ("got_r1_diffusion_nano", "image", "both")):
        recipe_for = example(name).recipe_for
        kept = [recipe_for(one) for one in (first, first, second)]
        assert len({id(recipe.renderer.module) for recipe in kept}) == 3


@pytest.mark.parametrize("name", example("denoising_recipes").PUBLISHED)
def test_a_published_recipe_trains_a_step_from_ratio_one(name):
    recipe = evolve(example("denoising_recipes").recipe_for(name), **SMALL)
    seen = {}

    def observe(event, **facts):
        if event == "update_end":
            seen.update({k: float(v) for k, v in facts["metrics"].items()}, norm=float(facts["grad_norm"]))

    train(recipe, rollouts(recipe, recipe.read()), observe=observe)
    assert seen["norm"] > 0
    assert seen.get("image/ratio", 1.0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["full", "sum", "only_reasoning_image", "only_prompt_image", "without_spatial"])
def test_an_ablation_judges_what_its_name_says(name):
    ablations = example("ablations")
    recipe = evolve(ablations.nano_recipe(), judge=ablations.REWARDS[name], **SMALL)
    _, _, verdicts = next(rollouts(recipe, recipe.read())({}))
    wanted = {
        "full": {"ScenePromptImage", "SceneSemantic", "SceneSpatial", "SceneReasoningImage"},
        "sum": {"ScenePromptImage", "SceneSemantic", "SceneSpatial", "SceneReasoningImage"},
        "only_reasoning_image": {"SceneReasoningImage"},
        "only_prompt_image": {"ScenePromptImage"},
        "without_spatial": {"ScenePromptImage", "SceneSemantic", "SceneReasoningImage"},
    }[name]
    assert all(set(v.scores) == wanted for v in verdicts)
    scores = [{k: s.value for k, s in v.scores.items()} for v in verdicts]
    for verdict, s in zip(verdicts, scores, strict=True):
        expected = {
            "full": lambda s: (
                s["ScenePromptImage"] * (s["SceneSemantic"] + s["SceneSpatial"]) * s["SceneReasoningImage"]
            ),
            "sum": lambda s: sum(s.values()),
            "only_reasoning_image": lambda s: s["SceneReasoningImage"],
            "only_prompt_image": lambda s: s["ScenePromptImage"],
            "without_spatial": lambda s: s["ScenePromptImage"] * s["SceneSemantic"] * s["SceneReasoningImage"],
        }[name](s)
        assert verdict.total() == pytest.approx(expected)


def test_the_ablations_run_from_the_command_line(tmp_path, monkeypatch):
    ablations = example("ablations")
    base = evolve(ablations.nano_recipe(), **SMALL)
    monkeypatch.setattr(ablations, "nano_recipe", lambda: base)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--out", str(tmp_path), "--only", "sum", "--steps", "1"])
    ablations.main()
    assert (tmp_path / "sum-seed0" / "report.html").is_file()


def test_the_control_permutes_verdicts_within_groups_and_only_there(tiny):
    recipe: Recipe = tiny(group_size=4)
    _, drawn, _ = next(rollouts(recipe, recipe.read())({}))

    class Numbered(Judge):
        def judge(self, trajectories):
            return [Verdict.of("n", Score(float(i))) for i in range(len(trajectories))]

    found = [v.total() for v in example("shuffled_control").Shuffled(Numbered()).judge(drawn)]
    assert found != [float(i) for i in range(8)]
    assert sorted(found[:4]) == [0, 1, 2, 3]
    assert sorted(found[4:]) == [4, 5, 6, 7]


def test_the_checkpoint_script_teaches_and_goes_on_from_its_own_output(tmp_path, monkeypatch):
    script = example("nano_sft")
    monkeypatch.setattr(script, "BATCH", 2)
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(sys, "argv", ["nano_sft.py", "--out", str(first), "--steps", "2"])
    script.main()
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(second), "--steps", "1", "--start", str(first), "--noise", "0"])
    script.main()
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    assert (second / "model.safetensors").stat().st_size < 8e6
    assert GoTR1(str(second), guidance=1.0).num_image_tokens == 64
