from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl import ConfigError, Prompt, Trajectory
from reasonrl.judges import (
    DualStage,
    ScenePromptImage,
    SceneReasoningImage,
    SceneSemantic,
    SceneSpatial,
)
from reasonrl.scenes import compose, parser, splits, truth, world
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.testing import check_judge

ALL = (SceneSemantic(), SceneSpatial(), SceneReasoningImage(), ScenePromptImage())


def shown(text: str, *, asked: str | None = None, seed: int = 0) -> Trajectory:
    """A faultless plan and picture of `text`, as the answer to `asked`."""
    request = parse_prompt(text)
    scene = compose.place(request, np.random.default_rng(seed))
    return Trajectory(
        Prompt("p", asked or text),
        texts={"reasoning": compose.describe(scene, request)},
        images={"image": world.draw(scene)},
    )


def scores(trajectory: Trajectory) -> list[float | None]:
    return [judge.judge([trajectory])[0].total() for judge in ALL]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1199), st.integers(0, 10_000))
def test_a_faultless_answer_scores_one_everywhere(index, seed):
    assert scores(shown(splits.load("train")[index], seed=seed)) == [1.0, 1.0, 1.0, 1.0]


def test_the_wrong_relation_costs_layout_and_image_but_not_names():
    left, right = "a red circle left of a blue square", "a red circle right of a blue square"
    semantic, spatial, grounding, image = scores(shown(left, asked=right))
    assert (semantic, grounding) == (1.0, 1.0)
    assert spatial == pytest.approx(0.1)
    assert image == pytest.approx(3 / 4)


def test_a_plan_that_the_image_ignores_loses_grounding_only():
    good = shown("a red circle left of a blue square", seed=0)
    other = shown("a red circle left of a blue square", seed=5)
    mixed = Trajectory(good.prompt, texts=good.texts, images=other.images)
    semantic, spatial, grounding, image = scores(mixed)
    assert (semantic, spatial, image) == (1.0, 1.0, 1.0)
    assert grounding < 1.0


def test_no_plan_and_no_image_are_the_policys_fault():
    empty = Trajectory(Prompt("p", "a red circle"), texts={"reasoning": "hm"})
    semantic, spatial, grounding, image = scores(empty)
    assert (semantic, spatial) == (0.0, 0.0)
    assert (grounding, image) == (0.0, 0.0)


@pytest.mark.parametrize("judge", [SceneReasoningImage(), ScenePromptImage(), ScenePromptImage("soft")])
def test_an_image_of_another_size_leaves_a_judge_of_images_silent(judge):
    good = shown("a red circle")
    (verdict,) = judge.judge([Trajectory(good.prompt, texts=good.texts, images={"image": Image.new("RGB", (32, 48))})])
    assert verdict.total() is None
    assert next(iter(verdict.scores.values())).note == "not a drawn scene: expected 64x64 pixels, got 32x48"


def test_a_prompt_that_is_no_scene_leaves_every_judge_silent():
    good = shown("a red circle")
    foreign = Trajectory(Prompt("p", "a dog in a park"), texts=good.texts, images=good.images)
    for judge in (SceneSemantic(), SceneSpatial(), ScenePromptImage()):
        (verdict,) = judge.judge([foreign])
        assert verdict.total() is None
        assert "not a scene prompt" in next(iter(verdict.scores.values())).note


def test_a_score_of_one_is_exactly_the_exact_parsers_yes():
    rng = np.random.default_rng(1)
    for text in splits.load("test")[:60]:
        tokens = compose.demonstration(text, rng).tokens
        from reasonrl.scenes import codec

        picture = codec.decode(tokens)
        trajectory = Trajectory(Prompt("p", text), texts={"reasoning": ""}, images={"image": picture})
        says = ScenePromptImage().judge([trajectory])[0].total() == 1.0
        assert says == truth.exact(parse_prompt(text), parser.read_image(picture))


def test_both_published_forms_are_the_products_they_claim():
    trajectory = shown("a red circle left of a blue square", asked="a red circle right of a blue square")
    semantic, spatial, grounding, image = scores(trajectory)
    assert DualStage("arxiv-v1").judge([trajectory])[0].total() == pytest.approx(
        image * (semantic + spatial) * grounding
    )
    assert DualStage("iclr-2026").judge([trajectory])[0].total() == pytest.approx(
        image * (semantic + spatial) / 2 * grounding
    )


def test_the_preference_factor_multiplies_the_newer_form_only():
    trajectory = shown("a red circle")
    half = (0.5 * SceneSemantic()).named("preference")
    assert DualStage("iclr-2026", preference=half).judge([trajectory])[0].total() == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="preference"):
        DualStage("arxiv-v1", preference=half)


@pytest.mark.parametrize("judge", [*ALL, ScenePromptImage("soft"), DualStage(), DualStage("iclr-2026")])
def test_scene_judges_keep_the_contract(judge):
    check_judge(judge)
