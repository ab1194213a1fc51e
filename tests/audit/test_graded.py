"""The graded set: what it says is wrong is wrong, and nothing else is."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from reasonrl.audit import graded
from reasonrl.audit.graded import EXACT, QUALITIES, graded_set
from reasonrl.errors import ConfigError
from reasonrl.plan import Plan
from reasonrl.scenes import parser
from reasonrl.scenes.grammar import CATEGORIES, parse_prompt

NUM = 36
SET = graded_set(NUM)
IMAGE_OK = {"right", "elsewhere", "unplaced", "plan unrelated"}
PLAN_OK = {"right", "elsewhere", "image unrelated"}
SAME = {"right", "attribute", "relation", "count", "missing", "extra", "unrelated"}


@pytest.mark.parametrize("quality", QUALITIES)
def test_each_grade_has_the_exact_scores_that_its_name_says(quality):
    members = [each for each in SET if each.quality == quality]
    assert members
    for each in members:
        scores = each.exact
        assert (scores["prompt-image"] == 1) == (quality in IMAGE_OK)
        plan_ok = scores["semantic"] == scores["spatial"] == 1
        assert plan_ok == (quality in PLAN_OK), (quality, each.trajectory.reasoning)
        assert (scores["reasoning-image"] == 1) == (quality in SAME)
        if quality == "relation":
            assert scores["semantic"] == 1
        if quality == "unrelated":
            assert each.against(EXACT) == 0


def test_a_group_holds_each_grade_once_and_all_that_its_prompt_allows():
    for _, rows in groupby(SET, key=lambda each: each.group):
        members = list(rows)
        request = parse_prompt(members[0].trajectory.prompt.text)
        found = [each.quality for each in members]
        assert len(set(found)) == len(found)
        assert ("relation" in found) == bool(request.relations)
        assert ("missing" in found) == (len(request.instances) > 1)
        assert 8 <= len(found) <= 11
        assert [each.trajectory.member for each in members] == [(k,) for k in range(len(members))]


def test_categories_take_turns_and_grades_no_fixed_place():
    firsts = [next(rows) for _, rows in groupby(SET, key=lambda each: each.group)]
    assert Counter(each.category for each in firsts) == dict.fromkeys(CATEGORIES, NUM // len(CATEGORIES))
    assert len({each.quality for each in firsts}) > 4


def test_a_seed_asks_the_same_and_another_seed_something_else():
    def told(found):
        return [(each.trajectory.prompt.text, each.trajectory.reasoning, each.quality) for each in found]

    assert told(graded_set(6, seed=3)) == told(graded_set(6, seed=3))
    assert told(graded_set(6, seed=3)) != told(graded_set(6, seed=4))
    assert told(graded_set(12, seed=3))[: len(graded_set(6, seed=3))] == told(graded_set(6, seed=3))


def test_an_enlarged_picture_shows_the_same_pixels():
    small = SET[0]
    large = graded.seen(small.trajectory, 448)
    assert large.image.size == (448, 448)
    assert np.array_equal(np.asarray(large.image)[3::7, 3::7], np.asarray(small.trajectory.image))
    assert graded.seen(small.trajectory, 64).image == small.trajectory.image
    assert (large.reasoning, large.prompt) == (small.trajectory.reasoning, small.trajectory.prompt)


@pytest.mark.parametrize("side", [0, 32, 100])
def test_a_side_that_is_no_whole_enlargement_is_refused(side):
    with pytest.raises(ConfigError, match=f"multiple of 64 pixels, got {side}"):
        graded.seen(SET[0].trajectory, side)


def test_plans_read_back_without_repairs_but_for_the_boxes_left_out():
    for each in SET:
        plan = Plan.parse(each.trajectory.reasoning)
        assert plan.ok or each.quality == "unplaced"
        assert parser.read_image(each.trajectory.image).num_stray == 0


def test_the_reward_of_some_aspects_is_the_published_product_without_the_others():
    [right] = [each for each in SET if each.quality == "right"][:1]
    fake = graded.Graded(right.trajectory, "right", dict(zip(EXACT, (0.5, 0.2, 0.6, 0.25), strict=True)))
    assert fake.against(EXACT) == pytest.approx(0.5 * 0.4 * 0.25)
    assert fake.against(["semantic", "spatial"]) == pytest.approx(0.4)
    assert fake.against(["spatial"]) == pytest.approx(0.6)
    assert fake.against(["prompt-image"]) == 0.5


@pytest.mark.parametrize("num", [0, -1, 5000])
def test_more_prompts_than_there_are_is_refused(num):
    with pytest.raises(ConfigError, match=f"got {num}"):
        graded_set(num)
