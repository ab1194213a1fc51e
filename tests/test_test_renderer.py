import json
import re

import pytest
from attrs import evolve, frozen
from PIL import Image
from safetensors.torch import load_file
from tests.painted import START, Brightness, Gray, Quiet, recipe

from reasonrl.config import from_record, override, to_record
from reasonrl.errors import ConfigError
from reasonrl.interfaces import PointwiseJudge
from reasonrl.objectives import GRPO
from reasonrl.recipe import Recipe
from reasonrl.session import run
from reasonrl.testing import ToyRenderer

ROOTS = {"recipe": Recipe, "gray": Gray, "brightness": Brightness}


class Finer(Gray):
    """Another class, and so with weights of its own."""


@frozen
class Sides(PointwiseJudge):
    """The picture's side, over 100."""

    needs = frozenset({"image"})

    def score(self, trajectory):
        return trajectory.image.width / 100


@pytest.fixture
def tests(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a\nb\n")
    return {"mine": str(path)}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def size(path):
    with Image.open(path) as picture:
        return picture.size


def refuses(message, **changes):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        recipe(**changes)


# ---- Sharing -------------------------------------------------------------------------------------


def test_it_draws_what_is_tested_with_the_weights_that_are_trained(tests, tmp_path):
    asked = recipe(test_renderer=Gray(num_strokes=9, size=16), tests=tests, test_judge=Sides(), show_every=1)
    assert asked.test_renderer.module is asked.renderer.module
    run(asked, tmp_path / "run", quiet=True)
    sizes = {
        name: {size(tmp_path / "run" / line["image"]) for line in lines(tmp_path / "run" / name)}
        for name in ("evaluations.jsonl", "samples.jsonl")
    }
    assert sizes == {"evaluations.jsonl": {(16, 16)}, "samples.jsonl": {(8, 8)}}
    assert {line["scores"]["Sides"] for line in lines(tmp_path / "run" / "evaluations.jsonl")} == {0.16}
    assert asked.renderer.module.level.item() != START
    assert asked.renderer._replays
    assert all(len(t) for t in asked.renderer._replays)


def test_a_record_builds_it_on_the_renderers_weights_again():
    asked = recipe(renderer=Gray(size=4), test_renderer=Gray(num_strokes=3), average=0.9, policy=Quiet())
    record = to_record(asked, roots=ROOTS)
    assert record["average"] == 0.9
    assert record["test_renderer"] == {"use": "gray", "num_strokes": 3}
    record["policy"] = {"use": "quiet"}
    again = from_record(record, roots={**ROOTS, "quiet": Quiet})
    assert again.average == 0.9
    assert (again.test_renderer.num_strokes, again.test_renderer.size) == (3, 8)
    assert again.renderer.size == 4
    assert again.test_renderer.module is again.renderer.module is not asked.renderer.module
    assert "average" not in to_record(recipe(), roots=ROOTS)
    assert "test_renderer" not in to_record(recipe(), roots=ROOTS)


def test_variants_and_overrides_keep_sharing():
    asked = override(recipe(test_renderer=Gray(num_strokes=3)), "test_renderer.num_strokes=5")
    assert asked.test_renderer == Gray(num_strokes=5)
    other = evolve(asked, renderer=Gray(size=2))
    for one in (asked, other, evolve(asked, seed=1)):
        assert one.test_renderer.module is one.renderer.module
        assert one.test_renderer.num_strokes == 5
    assert other.renderer.module is not asked.renderer.module


def test_one_with_weights_of_its_own_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"test_renderer Finer has weights of its own.* attrs.evolve\(renderer"):
        run(recipe(test_renderer=Finer()), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_one_without_weights_is_taken_as_it_is(tests, tmp_path):
    asked = recipe(test_renderer=ToyRenderer(size=20), tests=tests, test_judge=Sides(), steps=1)
    assert asked.test_renderer == ToyRenderer(size=20)
    run(asked, tmp_path / "run", quiet=True)
    assert {line["scores"]["Sides"] for line in lines(tmp_path / "run" / "evaluations.jsonl")} == {0.2}


# ---- What suits the judge of tests ---------------------------------------------------------------


@frozen
class Boxes(PointwiseJudge):
    """Needs what no renderer here provides."""

    needs = frozenset({"image", "boxes"})

    def score(self, trajectory):
        return 1.0


class Boxed(ToyRenderer):
    """Provides what that judge needs."""

    provides = frozenset({"image", "boxes"})


def test_what_the_judge_of_tests_needs_must_come_from_the_test_renderer():
    message = (
        "the judge of tests needs ['boxes'], but policy and test_renderer provide ['image', 'plan', 'reasoning']:"
        " give another test_renderer or test_judge"
    )
    refuses(message, test_judge=Boxes(), test_renderer=Gray())
    assert recipe(test_judge=Boxes(), test_renderer=Boxed()).test_judge == Boxes()
    with pytest.raises(ConfigError, match=r"the judge needs \['boxes'\]"):
        recipe(test_judge=Boxes())
    # Without a test judge the judge tests, and needs the same.
    boxed = recipe(renderer=Boxed(), policy=Talks(), judge=Boxes())
    with pytest.raises(ConfigError, match="the judge of tests needs"):
        evolve(boxed, test_renderer=ToyRenderer())


class Talks(Quiet):
    """A policy with a stage, so that something is trained."""

    stages = ("reasoning",)
    offers = {"reasoning": frozenset({"log_probs", "entropy"})}  # noqa: RUF012 - a property of the interface


def test_a_stage_that_the_judge_of_tests_speaks_of_must_be_drawn():
    refuses(
        "the judge of tests is .on stage 'imge', which nobody draws. Did you mean 'image'? Stages: image",
        test_judge=Brightness().on("imge"),
        test_renderer=Gray(),
    )
    named = {"objectives": {"gray": GRPO()}, "judge": Brightness().on("gray"), "renderer": Gray(stage="gray")}
    assert recipe(**named, test_renderer=Gray(stage="gray")).test_renderer.stages == ("gray",)
    assert recipe(**named, test_renderer=ToyRenderer(), test_judge=Brightness().on("image")).test_renderer is not None


def test_a_stage_drawn_by_the_policy_and_by_the_test_renderer_is_refused():
    refuses(
        "policy and test_renderer both draw ['reasoning']: stage names must differ",
        policy=Talks(),
        objectives={"reasoning": GRPO()},
        test_renderer=Gray(stage="reasoning"),
    )


# ---- What a run leaves ---------------------------------------------------------------------------


def test_a_trained_renderer_is_saved_beside_a_frozen_policy(tmp_path):
    asked = recipe()
    run(asked, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model" / "policy.txt").read_text() == "quiet"
    level = load_file(tmp_path / "run" / "renderer" / "paint.safetensors")["level"].item()
    assert level == asked.renderer.module.level.item() != START


def test_a_renderer_that_nothing_trains_is_not_saved(tiny, tmp_path):
    asked = evolve(tiny(objectives={"reasoning": GRPO()}, steps=1), renderer=Gray(stage="gray"))
    run(asked, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "renderer").exists()
