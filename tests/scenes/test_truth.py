import time
from itertools import permutations

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.plan import Box, Plan, PlannedObject
from reasonrl.scenes import splits, truth
from reasonrl.scenes.compose import describe, place
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.scenes.parser import Reading, read_image
from reasonrl.scenes.world import SceneObject, box_at, draw

every_prompt = st.sampled_from([p for name in splits.NAMES for p in splits.load(name)])


def drawn(*names, edge=2):
    places = [(0, 0), (6, 0), (0, 6), (6, 6), (3, 3)]
    objects = []
    for name, (column, row) in zip(names, places, strict=False):
        color, shape = name.split()
        objects.append(SceneObject(shape, color, "solid", box_at(column, row, edge)))
    return tuple(objects)


def score(text, *names, num_stray=0):
    return truth.fraction(parse_prompt(text), Reading(drawn(*names), num_stray))


@given(every_prompt, st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_a_scene_made_for_a_prompt_is_exactly_what_it_asks(prompt, seed):
    request = parse_prompt(prompt)
    scene = place(request, np.random.default_rng(seed))
    reading = read_image(draw(scene))
    assert truth.exact(request, reading)
    assert truth.fraction(request, reading) == 1.0
    planned = truth.objects_of_plan(Plan.parse(describe(scene, request)).objects)
    assert truth.named_fraction(request, planned) == 1.0
    assert truth.layout_fraction(request, planned) == 1.0


@given(every_prompt, st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=100)
def test_losing_an_object_or_having_a_stray_cell_is_never_exact(prompt, seed, data):
    request = parse_prompt(prompt)
    scene = place(request, np.random.default_rng(seed))
    lost = data.draw(st.integers(0, len(scene.objects) - 1))
    fewer = Reading(scene.objects[:lost] + scene.objects[lost + 1 :])
    stray = Reading(scene.objects, 1)
    for reading in (fewer, stray):
        assert not truth.exact(request, reading)
        assert truth.fraction(request, reading) < 1.0


@given(every_prompt, st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=100)
def test_the_order_of_objects_does_not_matter(prompt, seed, data):
    request = parse_prompt(prompt)
    other = parse_prompt(data.draw(every_prompt))
    objects = place(other, np.random.default_rng(seed)).objects
    shuffled = data.draw(st.permutations(objects))
    both = [truth.fraction(request, Reading(tuple(order))) for order in (objects, shuffled)]
    assert both[0] == both[1]


def test_the_atoms_of_two_objects_are_three():
    assert score("a red circle and a blue square", "red circle", "blue square") == 1
    assert score("a red circle and a blue square", "red circle") == 2 / 3
    assert score("a red circle and a blue square", "red circle", "red square") == 1 / 3
    assert score("a red circle and a blue square", "blue circle", "red square") == 0


def test_nothing_at_all_earns_nothing():
    for prompt in ("a red circle", "a circle above a square", "two circles"):
        assert score(prompt) == 0
        assert truth.named_fraction(parse_prompt(prompt), []) == 0
        assert truth.layout_fraction(parse_prompt(prompt), []) == 0


def test_one_too_many_and_one_too_few_cost_alike():
    asked = "two red circles and one blue square"
    right = score(asked, "red circle", "red circle", "blue square")
    many = score(asked, "red circle", "red circle", "red circle", "blue square")
    few = score(asked, "red circle", "blue square")
    assert (right, many, few) == (1.0, pytest.approx(4 / 6), pytest.approx(4 / 6))


def test_objects_are_assigned_so_that_the_relation_holds():
    request = parse_prompt("a circle left of a square")
    objects = drawn("red square", "red circle", "blue square")  # square, circle, lower square
    found = truth.atoms(request, objects)
    assert found.present == (True, True)
    assert found.relations == (False,)
    further = (*objects, SceneObject("square", "pink", "solid", box_at(6, 6, 2)))
    moved = (evolve(further[1], box=box_at(3, 6, 2)), further[3], further[0])
    assert truth.atoms(request, moved).relations == (True,)


def test_a_free_kind_leaves_the_named_one_to_its_object():
    for names in permutations(("red circle", "blue circle")):
        assert score("a circle and a blue circle", *names) == 1


def test_names_of_a_plan_are_read_as_attributes():
    names = [
        "Striped red circle",
        "a blue square",
        "circle",
        "red dog",
        "circle red",
        "red red circle",
    ]
    box = Box(0, 0, 250, 250)
    said = [(o.shape, o.color, o.texture) for o in truth.objects_of_plan([PlannedObject(name, box) for name in names])]
    nothing = (None, None, None)
    assert said == [
        ("circle", "red", "striped"),
        ("square", "blue", "solid"),
        ("circle", None, "solid"),
        nothing,
        nothing,
        nothing,
    ]


def test_unreadable_names_are_extra_objects():
    request = parse_prompt("a red circle")
    plan = truth.objects_of_plan([PlannedObject("red circle", None), PlannedObject("dog", None)])
    assert truth.named_fraction(request, plan) == 1 / 2


def test_layout_without_relations_asks_for_boxes_apart():
    request = parse_prompt("a red circle and a blue square")
    here, there = Box(0, 0, 250, 250), Box(500, 0, 750, 250)
    for second, expected in ((there, 1.0), (here, 0.0), (None, 0.5)):
        plan = [PlannedObject("red circle", here), PlannedObject("blue square", second)]
        assert truth.layout_fraction(request, truth.objects_of_plan(plan)) == expected


def test_many_identical_objects_are_judged_quickly():
    request = parse_prompt("a circle above a circle, and a circle below a circle")
    many = truth.objects_of_plan([PlannedObject("red circle", Box(0, 0, 250, 250))] * 32)
    began = time.perf_counter()
    assert truth.atoms(request, many).present == (True,) * 4
    assert time.perf_counter() - began < 1
