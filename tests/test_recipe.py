import math
import re

import pytest
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import ConfigError
from reasonrl.interfaces import Objective, PointwiseJudge, Policy, Renderer, Trainable
from reasonrl.objectives import GRPO, Supervised
from reasonrl.recipe import Recipe, by_parent, by_prompt, load_prompts
from reasonrl.testing import ToyJudge, ToyRenderer
from reasonrl.types import Prompt

LIKELIHOOD = frozenset({"log_probs", "entropy"})
moderate = settings(max_examples=40, deadline=None)


class Unified(Policy):
    """Draws text and image tokens, but no image of its own."""

    stages = ("reasoning", "image")
    offers = dict.fromkeys(stages, LIKELIHOOD)
    module = None
    replay = save = sample = None


class Planner(Unified):
    """Draws text alone."""

    stages = ("reasoning",)
    offers = dict.fromkeys(stages, LIKELIHOOD)


class Flow(Renderer, Trainable):
    """Draws a stage of its own, without a likelihood."""

    stages = ("image",)
    offers = dict.fromkeys(stages, frozenset({"velocity"}))
    module = None
    render = replay = save = None


@frozen
class Looks(PointwiseJudge):
    """A judge of images, or of whatever `needs` says."""

    needs: frozenset[str] = frozenset({"image"})

    def score(self, trajectory):
        return 1.0


class Velocity(Objective):
    """An objective that learns from velocities."""

    needs = frozenset({"velocity"})
    advantages = loss = None


def recipe(policy=None, **changes):
    settings = {"policy": policy or Unified(), "judge": ToyJudge()}
    if "objectives" not in changes:
        settings["objective"] = GRPO()
    return Recipe(**{**settings, **changes})


def refuses(message, **changes):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        recipe(**changes)


# ---- Refusals --------------------------------------------------------------------------------


def test_neither_or_both_of_objective_and_objectives_are_refused():
    message = "a recipe needs either objective= (all stages) or objectives= (by stage), one of the two"
    refuses(message, objective=None)
    refuses(message, objectives={})
    refuses(message, objective=GRPO(), objectives={"image": GRPO()})


def test_a_misspelt_stage_of_objectives_is_refused_with_a_suggestion():
    refuses(
        "objectives name stage 'reasonning', which nobody draws. Did you mean 'reasoning'? Stages: reasoning, image",
        objectives={"reasonning": GRPO()},
    )
    refuses(
        "objectives name stage 'imagee', which nobody draws. Did you mean 'image'? Stages: reasoning, image",
        objectives={("reasoning", "imagee"): GRPO()},
    )


def test_a_stage_like_no_other_is_refused_without_a_suggestion():
    refuses(
        "objectives name stage 'zzz', which nobody draws. Stages: reasoning, image",
        objectives={"zzz": GRPO()},
    )


def test_a_misspelt_stage_of_a_judge_is_refused_with_a_suggestion():
    refuses(
        "the judge is .on stage 'imge', which nobody draws. Did you mean 'image'? Stages: reasoning, image",
        judge=ToyJudge() + ToyJudge().named("other").on("imge"),
    )


def test_a_trained_stage_that_nobody_scores_is_refused():
    message = (
        "no judge speaks of stage image, which an objective trains: add one .on it, or leave the"
        " stage out of objectives"
    )
    refuses(message, judge=ToyJudge().on("reasoning"))
    refuses(message, judge=ToyJudge().on("reasoning"), objectives={("reasoning", "image"): GRPO()})
    frozen = recipe(judge=ToyJudge().on("reasoning"), objectives={"reasoning": GRPO()})
    assert frozen.claims.keys() == {("reasoning",)}


def test_a_stage_claimed_twice_is_refused():
    refuses(
        "stage image is claimed by two objectives: give each stage to one",
        objectives={("reasoning", "image"): GRPO(), "image": GRPO()},
    )
    refuses(
        "stage image is claimed by two objectives: give each stage to one",
        objectives={("image", "image"): GRPO()},
    )


def test_two_parts_that_draw_one_stage_name_are_refused():
    message = "policy and renderer both draw one of the stages ['reasoning', 'image', 'image']: stage names must differ"
    refuses(message, renderer=Flow())
    refuses(message, renderer=Flow(), objectives={"reasoning": GRPO()})


def test_an_objective_over_two_trainables_is_refused():
    refuses(
        "GRPO claims ('reasoning', 'image'), stages of two trainables: split the claim",
        policy=Planner(),
        renderer=Flow(),
        objectives={("reasoning", "image"): GRPO()},
    )


def test_an_objective_that_needs_what_no_replay_offers_is_refused():
    refuses(
        "GRPO needs ['entropy', 'log_probs'] of stage 'image', but Flow offers ['velocity']",
        policy=Planner(),
        renderer=Flow(),
    )
    split = recipe(Planner(), renderer=Flow(), objectives={"reasoning": GRPO(), "image": Velocity()})
    assert split.stages == ("reasoning", "image")


def test_a_judge_that_needs_what_nobody_provides_is_refused():
    message = (
        "the judge needs ['image'], but policy and renderer provide ['plan', 'reasoning']:"
        " add a renderer or another judge"
    )
    refuses(message, judge=Looks())
    refuses(message, judge=ToyJudge() * Looks().on("reasoning"))
    refuses(message, test_judge=Looks())
    assert "image" in recipe(judge=Looks(), renderer=ToyRenderer()).provides


def test_all_unmet_needs_are_named():
    refuses(
        "the judge needs ['depth', 'saliency'], but policy and renderer provide"
        " ['image', 'plan', 'reasoning']: add a renderer or another judge",
        judge=Looks(frozenset({"saliency", "image", "depth"})),
        renderer=ToyRenderer(),
    )


def test_a_group_of_one_is_refused_for_grpo_alone():
    message = "group_size must be at least 2 for GRPO, got 1: a group of one has no baseline"
    refuses(message, group_size=1)
    refuses(message, group_size=1, objectives={"reasoning": Supervised(), "image": GRPO()})
    assert recipe(objective=Supervised(), group_size=1).group_size == 1


def test_a_variant_is_checked_like_the_original():
    with pytest.raises(ConfigError, match="a group of one has no baseline"):
        evolve(recipe(), group_size=1)
    assert evolve(recipe(), seed=5).seed == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"prompts_per_step": 0},
        {"group_size": 0},
        {"num_updates": 0},
        {"num_rows": 0},
        {"num_actions": -1},
        {"learning_rate": 0.0},
        {"schedule": "linear"},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
        {"max_unscored": 1.5},
        {"judge_timeout_s": 0.0},
        {"save_every": 0},
        {"keep": 0},
        {"show_every": 0},
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        recipe(**wrong)


# ---- Answers ---------------------------------------------------------------------------------


def test_one_objective_claims_every_stage_apart():
    objective = GRPO()
    found = recipe(objective=objective).claims
    assert found == {("reasoning",): objective, ("image",): objective}


def test_a_name_is_a_claim_of_one_stage_and_a_tuple_of_several():
    found = recipe(objectives={"image": GRPO()}).claims
    assert list(found) == [("image",)]
    found = recipe(objectives={("reasoning", "image"): GRPO()}).claims
    assert list(found) == [("reasoning", "image")]


def test_a_renderer_is_trained_where_it_draws_a_stage():
    flow = Flow()
    objectives = {"reasoning": GRPO(), "image": Velocity()}
    found = recipe(Planner(), renderer=flow, objectives=objectives)
    assert found.trainables[1] is flow
    assert len(recipe(renderer=ToyRenderer()).trainables) == 1


def test_a_recipe_without_a_judge_is_for_demonstrations():
    assert recipe(judge=None, objective=Supervised()).judge is None


def test_prompts_given_are_prompts_read():
    prompts = (Prompt("a", "a red cup"), Prompt("b", "two dogs"))
    assert load_prompts(list(prompts)) == prompts
    assert recipe(prompts=prompts).read() == prompts
    assert [by_prompt(p.id, (3, 1)) for p in prompts] == ["a", "b"]


def test_by_parent_compares_the_plans_of_a_prompt_and_the_images_of_a_plan():
    plans = [by_parent("a", (g,)) for g in range(3)]
    images = [by_parent("a", (g, k)) for g in range(2) for k in range(2)]
    assert len(set(plans)) == 1
    assert images[0] == images[1] != images[2] == images[3]
    assert by_parent("b", (0,)) not in {*plans, *images}


# ---- Learning rate ---------------------------------------------------------------------------


@moderate
@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["constant", "cosine"]))
def test_the_rate_rises_in_the_warm_up_and_stays_within_its_peak(steps, warmup_steps, schedule):
    asked = recipe(steps=steps, warmup_steps=warmup_steps, schedule=schedule, learning_rate=0.5)
    rates = [asked.rate(step) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    if schedule == "constant":
        assert rates == sorted(rates)
    else:
        after = rates[max(0, warmup_steps - 1) :]
        assert after == sorted(after, reverse=True)


@moderate
@given(st.integers(1, 50), st.integers(0, 200))
def test_a_constant_rate_without_a_warm_up_is_constant(steps, step):
    assert recipe(steps=steps, learning_rate=0.25).rate(step) == 0.25


def test_golden_warm_up_reaches_the_rate_at_its_last_step():
    asked = recipe(steps=10, warmup_steps=4, learning_rate=0.8)
    found = [asked.rate(step) for step in range(6)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_golden_cosine_falls_from_the_rate_through_its_half_to_zero():
    asked = recipe(steps=8, schedule="cosine", learning_rate=0.8)
    assert asked.rate(0) == pytest.approx(0.8)
    assert asked.rate(2) == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert asked.rate(4) == pytest.approx(0.4)
    assert 0 < asked.rate(7) < asked.rate(6)
    assert asked.rate(8) == pytest.approx(0, abs=1e-12)
    assert asked.rate(20) == pytest.approx(0, abs=1e-12)


def test_golden_cosine_with_a_warm_up_is_their_product():
    asked = recipe(steps=4, schedule="cosine", warmup_steps=2, learning_rate=1.0)
    expected = [0.5, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))]
    assert [asked.rate(step) for step in range(4)] == pytest.approx(expected)


def test_weights_that_nobody_keeps_cannot_draw():
    with pytest.raises(ConfigError, match=r"sample_with draws 'reasoning' with weights 'average', and nobody keeps"):
        recipe(sample_with={"reasoning": "average"})
    with pytest.raises(ConfigError, match=r"sample_with names stage 'reasonning'.* Did you mean 'reasoning'"):
        recipe(sample_with={"reasonning": "average"}, average=0.9)
    assert recipe(sample_with={"reasoning": "average"}, average=0.9).average == 0.9


def test_groupings_are_named_in_records_and_unknown_names_refused():
    assert recipe(group_by=by_parent).group_by == "parent"
    assert recipe(group_by="parent").group_of is by_parent
    assert recipe().group_of is by_prompt
    with pytest.raises(ConfigError, match="group_by must be 'prompt' or 'parent', or a function, got 'parents'"):
        recipe(group_by="parents")
