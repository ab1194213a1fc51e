import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import DataError
from reasonrl.plan import Plan
from reasonrl.relations import Relation
from reasonrl.scenes import codec, parser, splits, truth
from reasonrl.scenes.compose import NO_FAULTS, Faults, demonstration, describe, place
from reasonrl.scenes.grammar import Request, Wanted, parse_prompt
from reasonrl.scenes.world import SOLID, Scene, SceneObject, box_at, draw

every_prompt = st.sampled_from([p for name in splits.NAMES for p in splits.load(name)])
seeds = st.integers(0, 2**32)


@given(every_prompt, seeds)
@settings(deadline=None, max_examples=100)
def test_a_faultless_teacher_is_exactly_right(prompt, seed):
    shown = demonstration(prompt, np.random.default_rng(seed), NO_FAULTS)
    assert shown.prompt == prompt
    assert shown.tokens.shape == (64,)
    assert shown.tokens.dtype == np.int64
    assert truth.exact(parse_prompt(prompt), parser.read_tokens(shown.tokens))


@given(every_prompt, seeds)
@settings(deadline=None, max_examples=100)
def test_plan_and_image_fail_together(prompt, seed):
    rng = np.random.default_rng(seed)
    shown = demonstration(prompt, rng, Faults(1, 1, 1, corrupted_tokens=0))
    plan = Plan.parse(shown.plan_text)
    assert not plan.skipped
    planned = sorted((o.name, str(o.box)) for o in plan.objects)
    reading = parser.read_tokens(shown.tokens)
    assert planned == sorted((o.name, str(o.box)) for o in reading.objects)
    assert reading.num_stray == 0
    assert 1 <= len(planned) <= 4


@given(every_prompt, seeds)
@settings(deadline=None, max_examples=30)
def test_a_demonstration_is_a_function_of_its_seed(prompt, seed):
    one, two = (demonstration(prompt, np.random.default_rng(seed)) for _ in range(2))
    assert one.plan_text == two.plan_text
    assert (one.tokens == two.tokens).all()


def test_the_wire_form_is_the_expected_one():
    scene = Scene(
        (
            SceneObject("circle", "red", "striped", box_at(1, 2, 2)),
            SceneObject("square", "blue", "solid", box_at(5, 2, 2)),
            SceneObject("cross", "pink", "solid", box_at(0, 5, 2)),
        )
    )
    request = parse_prompt("a red circle left of a blue square, and a cross")
    assert describe(scene, request) == (
        "<|obj_start|>striped red circle<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|>"
        " left of <|obj_start|>blue square<|obj_end|> <|box_start|>(625,250),(875,500)<|box_end|>"
        " and <|obj_start|>pink cross<|obj_end|> <|box_start|>(0,625),(250,875)<|box_end|>"
    )


def test_a_wrong_relation_shows_in_the_boxes_and_not_in_the_words():
    prompt = "a red circle left of a blue square"
    rng = np.random.default_rng(0)
    for _ in range(50):
        shown = demonstration(prompt, rng, Faults(1, 0, 0, 0))
        assert " left of " in shown.plan_text
        found = truth.atoms(parse_prompt(prompt), parser.read_tokens(shown.tokens).objects)
        assert found.present == (True, True)
    assert Relation.LEFT.value == "left of"


@pytest.mark.parametrize(
    ("prompt", "faults", "least", "most"),
    [
        ("a red circle left of a blue square", Faults(0.3, 0, 0, 0), 0.65, 0.76),
        ("two red circles and one square", Faults(0, 0, 0.25, 0), 0.70, 0.80),
        ("a red circle left of a blue square", Faults(0, 0, 0.25, 0), 1.0, 1.0),
        ("a red circle and a blue square", Faults(0.3, 0, 0.25, 0), 1.0, 1.0),
        ("a red circle and a blue square", Faults(0, 0.15, 0, 0), 0.80, 0.90),
    ],
)
def test_each_fault_is_as_frequent_as_it_says(prompt, faults, least, most):
    rng, request = np.random.default_rng(0), parse_prompt(prompt)
    shown = [demonstration(prompt, rng, faults).tokens for _ in range(500)]
    right = np.mean([truth.exact(request, parser.read_tokens(tokens)) for tokens in shown])
    assert least <= right <= most


def test_tokens_are_corrupted_as_often_as_asked():
    rng = np.random.default_rng(0)
    faults = Faults(0, 0, 0, corrupted_tokens=0.1)
    unread = 0
    for _ in range(100):
        shown = demonstration("a red square", rng, faults)
        (planned,) = Plan.parse(shown.plan_text).objects
        drawn = SceneObject("square", "red", _texture(planned.name), planned.box)
        clean = codec.encode(draw(Scene((drawn,))))
        unread += int((clean != shown.tokens).sum())
    assert 0.08 < unread / 6400 < 0.12


def _texture(name):
    return name.split()[0] if len(name.split()) == 3 else SOLID


def test_free_attributes_are_drawn_and_mostly_solid():
    rng, request = np.random.default_rng(0), parse_prompt("a circle")
    objects = [place(request, rng).objects[0] for _ in range(600)]
    assert len({o.color for o in objects}) == 8
    assert 0.81 < np.mean([o.texture == SOLID for o in objects]) < 0.89


def test_what_cannot_be_placed_is_refused():
    circle = Wanted("circle")
    both_ways = Request((circle, circle), ((0, Relation.LEFT, 1), (0, Relation.RIGHT, 1)))
    with pytest.raises(DataError, match="no layout in 20 tries"):
        place(both_ways, np.random.default_rng(0), max_tries=20)


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="wrong_count"):
        Faults(wrong_count=1.5)
