"""R_RI: planned boxes against located ones, and what does not pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from attrs import evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl import ConfigError, ContractError, Prompt, Trajectory
from reasonrl.judges.grounding import Found, Locator, Sight, VLMBoxes
from reasonrl.judges.reasoning_image import ReasoningImage
from reasonrl.judges.scene import SceneReasoningImage
from reasonrl.judges.vlm import VLM, Question, Reply
from reasonrl.plan import Box, PlannedObject, plain_name, print_object
from reasonrl.scenes import compose, parser, splits, world
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.testing import check_judge

A, B, C = Box(100, 100, 300, 300), Box(600, 100, 800, 300), Box(100, 600, 300, 900)
CANVAS = Box(0, 0, 1000, 1000)


@frozen
class Sees(Locator):
    """Finds what it is told is there, whatever the picture, and remembers its calls."""

    there: Mapping[str, Sequence[Box] | None] = field(factory=dict)
    asked: list[list[str]] = field(factory=list, eq=False)

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        self.asked.append([sight.name for sight in sights])
        return [self._found(sight.name) for sight in sights]

    def _found(self, name: str) -> Found:
        boxes = self.there.get(name, ())
        if boxes is None:
            return Found(None, "timed out: 60 s", {"calls": 0.0, "seconds": 60.0})
        return Found(tuple(boxes), cost={"calls": 1.0, "seconds": 0.5})


@frozen
class SceneEyes(Locator):
    """Looks at drawn scenes through the exact parser."""

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        return [
            Found(tuple(o.box for o in parser.read_image(s.image).objects if plain_name(o.name) == s.name))
            for s in sights
        ]


def answer(*objects: tuple[str, Box | None], image: bool = True) -> Trajectory:
    text = " and ".join(print_object(PlannedObject(name, box)) for name, box in objects)
    images = {"image": Image.new("RGB", (64, 64))} if image else {}
    return Trajectory(Prompt("p", "a cat and a dog"), texts={"reasoning": text}, images=images)


def score(judge: ReasoningImage, trajectory: Trajectory) -> float | None:
    return judge.judge([trajectory])[0].total()


def test_planned_and_located_boxes_that_agree_score_one():
    judge = ReasoningImage(Sees({"cat": [A], "dog": [B]}))
    assert score(judge, answer(("cat", A), ("the dog", B))) == 1.0


def test_the_score_is_the_mean_iou_and_what_is_missing_adds_its_stated_value():
    half = Box(100, 100, 200, 300)
    seen = Sees({"cat": [half]})
    assert score(ReasoningImage(seen), answer(("cat", A), ("dog", B))) == pytest.approx(0.25)
    assert score(ReasoningImage(seen, missing=0.5), answer(("cat", A), ("dog", B))) == pytest.approx(0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1199), st.integers(0, 999), st.integers(0, 999))
def test_on_drawn_scenes_it_is_the_exact_judges_score(index, seed, other):
    prompt = splits.load("train")[index]
    request = parse_prompt(prompt)
    planned, drawn = (compose.place(request, np.random.default_rng(s)) for s in (seed, other))
    trajectory = Trajectory(
        Prompt("p", prompt),
        texts={"reasoning": compose.describe(planned, request)},
        images={"image": world.draw(drawn)},
    )
    exact = SceneReasoningImage().judge([trajectory])[0].total()
    assert score(ReasoningImage(SceneEyes()), trajectory) == pytest.approx(exact)


# ---- what is nobody's, the policy's and the locator's fault ----


def test_no_plan_no_objects_and_no_image_are_zero_without_asking_anyone():
    seen = Sees({"cat": [A]})
    judge = ReasoningImage(seen)
    bare = Trajectory(Prompt("p", "a cat"), images={"image": Image.new("RGB", (64, 64))})
    verdicts = judge.judge([answer(), bare, answer(("cat", A), image=False)])
    assert [verdict.total() for verdict in verdicts] == [0.0, 0.0, 0.0]
    notes = [verdict.scores["ReasoningImage"].note for verdict in verdicts]
    assert notes == ["no planned objects", "no planned objects", "no image"]
    assert seen.asked == []


def test_one_name_that_could_not_be_looked_for_leaves_the_trajectory_unscored():
    judge = ReasoningImage(Sees({"cat": [A], "dog": None}))
    (verdict,) = judge.judge([answer(("cat", A), ("dog", B))])
    found = verdict.scores["ReasoningImage"]
    assert (found.value, found.note) == (None, "timed out: 60 s")
    assert found.cost == {"calls": 1.0, "seconds": 60.5}
    assert score(judge, answer(("cat", A))) == 1.0, "another trajectory is not touched"


def test_all_names_of_all_trajectories_are_looked_for_in_one_call_each_once():
    seen = Sees({"cat": [A, C], "dog": [B]})
    rows = [answer(("cat", A), ("a cat", C), ("dog", B)), answer(), answer(("Dog", B))]
    verdicts = ReasoningImage(seen).judge(rows)
    assert seen.asked == [["cat", "dog", "dog"]]
    assert [verdict.total() for verdict in verdicts] == [1.0, 0.0, 1.0]
    assert verdicts[0].scores["ReasoningImage"].cost == {"calls": 2.0, "seconds": 1.0}


def test_a_locator_that_forgets_a_sight_breaks_its_promise():
    class Forgetful(Locator):
        def locate(self, sights):
            return []

    with pytest.raises(ContractError, match="0 results for 1 sights"):
        ReasoningImage(Forgetful()).judge([answer(("cat", A))])


# ---- what does not pay ----


def test_leaving_out_the_box_of_a_hard_object_does_not_pay():
    judge = ReasoningImage(Sees({"cat": [A], "dog": []}))
    assert score(judge, answer(("cat", A), ("dog", None))) == score(judge, answer(("cat", A), ("dog", B))) == 0.5
    lenient = evolve(judge, missing=0.5)
    assert score(lenient, answer(("cat", A), ("dog", None))) < score(lenient, answer(("cat", A), ("dog", B)))


def test_leaving_out_every_object_is_zero_and_never_one():
    judge = ReasoningImage(Sees({"cat": [A]}), missing=1.0)
    assert score(judge, answer()) == 0.0


def test_planning_an_object_twice_does_not_pay_for_one_that_was_found():
    judge = ReasoningImage(Sees({"cat": [A]}))
    assert score(judge, answer(("cat", A), ("cat", A))) == 0.5
    assert score(judge, answer(*[("cat", A)] * 5)) == pytest.approx(0.2)


@given(st.lists(st.sampled_from([A, B, C, CANVAS]), max_size=6))
def test_spraying_boxes_under_one_name_never_beats_the_right_one(more):
    judge = ReasoningImage(Sees({"cat": [A]}))
    assert score(judge, answer(("cat", A), *[("cat", box) for box in more])) <= score(judge, answer(("cat", A)))


def test_a_box_as_large_as_the_canvas_agrees_with_a_background_unless_it_is_too_large_to_count():
    seen = Sees({"scene": [CANVAS], "cat": [A]})
    plan = answer(("scene", CANVAS), ("cat", B))
    assert score(ReasoningImage(seen), plan) == 0.5
    assert score(ReasoningImage(seen, max_area=0.9), plan) == 0.0
    assert score(ReasoningImage(seen, max_area=0.9), answer(("cat", A), ("scene", CANVAS))) == 0.5
    assert score(ReasoningImage(seen, max_area=0.9), answer(("cat", A))) == 1.0


def test_a_box_too_large_to_count_is_not_looked_for_and_is_zero():
    seen = Sees({"scene": [CANVAS]})
    assert score(ReasoningImage(seen, max_area=0.9, missing=0.25), answer(("scene", CANVAS))) == 0.0
    assert seen.asked == []


def test_canvas_sized_boxes_for_small_objects_earn_little():
    judge = ReasoningImage(Sees({"cat": [A], "dog": [B]}))
    assert score(judge, answer(("cat", CANVAS), ("dog", CANVAS))) == pytest.approx(0.04)


def test_vague_names_share_what_is_found_under_them():
    judge = ReasoningImage(Sees({"thing": [A, B]}))
    assert score(judge, answer(*[("thing", box) for box in (A, A, A, B)])) == 0.5


def test_one_place_under_two_names_counts_for_both_and_that_is_for_r_sem_to_see():
    judge = ReasoningImage(Sees({"cat": [A], "tabby": [A]}))
    assert score(judge, answer(("cat", A), ("tabby", A))) == 1.0


def test_duplicates_in_the_image_cost_what_the_field_says():
    seen = Sees({"dog": [A, B, C]})
    assert score(ReasoningImage(seen), answer(("dog", A))) == 1.0
    assert score(ReasoningImage(seen, duplicates="zeros"), answer(("dog", A))) == pytest.approx(1 / 3)
    assert score(ReasoningImage(seen, duplicates="zeros"), answer(("dog", A), ("dog", B), ("dog", C))) == 1.0


box = st.builds(
    lambda x, y, w, h: Box(x, y, min(1000, x + w), min(1000, y + h)),
    st.integers(0, 900), st.integers(0, 900), st.integers(10, 900), st.integers(10, 900),
)  # fmt: skip
named = st.lists(st.tuples(st.sampled_from(["cat", "dog", "thing"]), box), max_size=5)


@settings(deadline=None, max_examples=100)
@given(named, named, st.sampled_from(["ignored", "zeros"]), st.floats(0, 1), st.floats(0.01, 1))
def test_any_plan_and_any_findings_score_in_the_unit_interval(planned, seen, duplicates, missing, max_area):
    there = {name: [b for n, b in seen if n == name] for name, _ in seen}
    judge = ReasoningImage(Sees(there), missing=missing, duplicates=duplicates, max_area=max_area)
    value = score(judge, answer(*planned))
    assert value is not None
    assert 0.0 <= value <= 1.0
    lenient = score(evolve(judge, duplicates="ignored"), answer(*planned))
    assert value <= lenient or value == pytest.approx(lenient)


# ---- settings ----


@frozen
class Everywhere(VLM):
    """Reports the left half of any picture."""

    identity = "everywhere"
    log_probs = False
    coordinates = "thousandths"

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [Reply('[{"bbox_2d": [0, 0, 500, 1000], "label": "x"}]', cost={"calls": 1.0}) for _ in questions]


def test_a_vlm_in_place_of_a_locator_is_asked_for_boxes():
    judge = ReasoningImage(Everywhere())
    assert judge == ReasoningImage(VLMBoxes(Everywhere()))
    assert score(judge, answer(("cat", Box(0, 0, 500, 1000)), ("dog", CANVAS))) == pytest.approx(0.75)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="expected a Locator or a VLM, got NoneType"):
        ReasoningImage(None)
    for wrong in ({"missing": -0.1}, {"missing": 1.1}, {"missing": float("nan")}, {"duplicates": "punished"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ReasoningImage(Sees(), **wrong)
    for area in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="max_area"):
            ReasoningImage(Sees(), max_area=area)


@pytest.mark.parametrize("judge", [ReasoningImage(Everywhere()), ReasoningImage(Everywhere(), duplicates="zeros")])
def test_the_judge_keeps_the_contract(judge):
    check_judge(judge)
