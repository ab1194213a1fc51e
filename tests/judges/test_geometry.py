"""Relations and counts by calculation: every relation in every wording can score, and can fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from attrs import frozen
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl import Prompt, Trajectory
from reasonrl.judges.geometry import (
    FLOOR,
    ImageGeometry,
    PlanGeometry,
    boxes_named,
    count_value,
    relation_value,
)
from reasonrl.judges.grounding import Found, Locator, Sight
from reasonrl.judges.prompt_reading import NUMBERS, Asked, name_words, read_prompt, singular
from reasonrl.plan import Box, PlannedObject, print_object
from reasonrl.relations import PHRASES, Relation, holds
from reasonrl.scenes import compose, parser, splits, truth, world
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.testing import check_judge

COMPBENCH = Path(__file__).parents[3] / "shared" / "data" / "t2i-compbench"
WORDS = {number: word for word, number in NUMBERS.items()}
DIRECTIONS = (Relation.LEFT, Relation.RIGHT, Relation.ABOVE, Relation.BELOW)


@frozen
class SceneEyes(Locator):
    """Looks at drawn scenes through the exact parser; a "banded blue square" is a blue square too."""

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        return [Found(tuple(self._boxes(sight)), cost={"calls": 1.0}) for sight in sights]

    def _boxes(self, sight: Sight) -> Iterator[Box]:
        wanted = set(sight.name.split())
        return (o.box for o in parser.read_image(sight.image).objects if wanted <= set(o.name.split()))


@frozen
class Blind(Locator):
    """Cannot look for dogs."""

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        blind = Found(None, "timed out: 60 s", {"calls": 0.0})
        return [blind if s.name == "dog" else Found((Box(0, 0, 100, 100),), cost={"calls": 1.0}) for s in sights]


def planned(prompt: str, *objects: tuple[str, Box]) -> Trajectory:
    text = " and ".join(print_object(PlannedObject(name, box)) for name, box in objects)
    return Trajectory(Prompt("p", prompt), texts={"reasoning": text})


def layout_score(prompt: str, *objects: tuple[str, Box]) -> float | None:
    return PlanGeometry().judge([planned(prompt, *objects)])[0].total()


def drawn_score(prompt: str, objects: Sequence[world.SceneObject]) -> float | None:
    picture = world.draw(world.Scene(tuple(objects)))
    return ImageGeometry(SceneEyes()).judge([Trajectory(Prompt("p", prompt), images={"image": picture})])[0].total()


def at(x: int, y: int, side: int = 200) -> Box:
    return Box(x - side // 2, y - side // 2, x - side // 2 + side, y - side // 2 + side)


# Where the first object is, seen from a second one at the centre: most true last.
PATHS = {
    Relation.LEFT: [at(x, 500) for x in range(900, 99, -50)],
    Relation.RIGHT: [at(x, 500) for x in range(100, 901, 50)],
    Relation.ABOVE: [at(500, y) for y in range(900, 99, -50)],
    Relation.BELOW: [at(500, y) for y in range(100, 901, 50)],
    Relation.NEXT_TO: [at(x, 200) for x in range(900, 399, -50)],
    Relation.INSIDE: [at(x, 500, 100) for x in range(100, 501, 50)],
}
SECOND = {Relation.NEXT_TO: at(100, 200), Relation.INSIDE: at(500, 500, 400)}


# ---- every relation, in every wording ----


@pytest.mark.parametrize("phrase", PHRASES)
def test_moving_into_a_relation_never_lowers_the_score_and_every_wording_can_score_and_fail(phrase):
    relation = PHRASES[phrase]
    second = SECOND.get(relation, at(500, 500))
    prompt = f"a cup {phrase} a table"
    scores = [layout_score(prompt, ("cup", box), ("table", second)) for box in PATHS[relation]]
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (FLOOR, 1.0)


@pytest.mark.parametrize("phrase", [p for p, r in PHRASES.items() if r in DIRECTIONS])
def test_the_opposite_layout_of_a_direction_is_contradicted(phrase):
    relation = PHRASES[phrase]
    true, second = PATHS[relation][-1], at(500, 500)
    prompt = f"a cup {phrase} a table"
    assert layout_score(prompt, ("cup", true), ("table", second)) == 1.0
    assert layout_score(prompt, ("cup", second), ("table", true)) == FLOOR


@pytest.mark.parametrize("phrase", [p for p, r in PHRASES.items() if r is not Relation.INSIDE])
@pytest.mark.parametrize("seed", range(3))
def test_drawn_scenes_of_a_relation_score_one_and_of_its_contradiction_less(phrase, seed):
    relation = PHRASES[phrase]
    prompt = f"a red circle {phrase} a blue square"
    rng = np.random.default_rng(seed)
    good = compose.place(parse_prompt(f"a red circle {relation.value} a blue square"), rng)
    assert drawn_score(prompt, good.objects) == 1.0
    wrong = [
        (world.SceneObject("circle", "red", "solid", a), world.SceneObject("square", "blue", "solid", b))
        for a in compose._places(2)
        for b in compose._places(2)
        if world.are_apart(a, b) and not holds(relation, a, b)
    ]
    assert drawn_score(prompt, wrong[int(rng.integers(len(wrong)))]) == FLOOR


def test_above_scores_and_next_to_fails():
    """A public detector reward gives every "above" nothing, and every "next to" everything."""
    for prompt in ("a cup above a table", "a cup on top of a table", "a cup on the top of a table"):
        assert layout_score(prompt, ("cup", at(500, 200)), ("table", at(500, 700))) == 1.0
    for prompt in ("a cup next to a table", "a cup near a table", "a cup on side of a table", "a cup beside a table"):
        assert layout_score(prompt, ("cup", at(100, 100)), ("table", at(900, 900))) == FLOOR
        assert layout_score(prompt, ("cup", at(100, 500)), ("table", at(900, 500))) == FLOOR
        assert layout_score(prompt, ("cup", at(300, 500)), ("table", at(600, 500))) == 1.0


def test_on_top_of_is_above_and_not_within_and_inside_is_within_and_not_above():
    table, cup = Box(200, 400, 800, 900), Box(400, 250, 500, 450)
    assert layout_score("a cup on top of a table", ("cup", cup), ("table", table)) == 1.0
    assert layout_score("a cup inside a table", ("cup", cup), ("table", table)) == FLOOR
    within = Box(450, 600, 550, 700)
    assert layout_score("a cup inside a table", ("cup", within), ("table", table)) == 1.0
    assert layout_score("a cup on top of a table", ("cup", table), ("table", table)) == FLOOR
    assert layout_score("a cup inside a table", ("cup", table), ("table", table)) == FLOOR
    assert layout_score("a cup inside a table", ("cup", table), ("table", within)) == FLOOR


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(DIRECTIONS), st.tuples(*[st.integers(60, 940)] * 4), st.integers(1, 400))
def test_no_layout_is_hurt_by_a_step_further_in_the_direction(relation, places, step):
    x, y, other_x, other_y = places
    second = at(other_x, other_y, 120)
    dx, dy = {
        Relation.LEFT: (-step, 0), Relation.RIGHT: (step, 0), Relation.ABOVE: (0, -step), Relation.BELOW: (0, step)
    }[relation]  # fmt: skip
    assume(60 <= x + dx <= 940)
    assume(60 <= y + dy <= 940)
    prompt = f"a cup {relation.value} a table"
    before = layout_score(prompt, ("cup", at(x, y, 120)), ("table", second))
    after = layout_score(prompt, ("cup", at(x + dx, y + dy, 120)), ("table", second))
    assert after >= before


def test_copies_on_every_side_do_not_make_a_direction_true():
    around = [("cup", box) for box in (at(100, 500), at(900, 500), at(500, 100), at(500, 900))]
    table = ("table", at(500, 500))
    for relation in DIRECTIONS:
        assert layout_score(f"a cup {relation.value} a table", *around, table) == pytest.approx(FLOOR + 0.9 / 4)


def test_a_missing_object_contradicts_and_no_boxes_at_all_are_nothing():
    prompt = "a cup left of a table"
    assert layout_score(prompt, ("cup", at(100, 500))) == FLOOR
    assert layout_score(prompt, ("lamp", at(100, 500))) == FLOOR
    assert layout_score(prompt) == 0.0
    boxless = Trajectory(Prompt("p", prompt), texts={"reasoning": "<|obj_start|>cup<|obj_end|> and a table"})
    assert PlanGeometry().judge([boxless, Trajectory(Prompt("p", prompt))])[0].total() == 0.0


def test_two_of_one_name_may_stand_in_either_order():
    assert layout_score("a dog left of a dog", ("dog", at(200, 500)), ("dog", at(700, 500))) == 1.0
    assert layout_score("a dog left of a dog", ("dog", at(500, 200)), ("dog", at(500, 700))) == FLOOR
    assert layout_score("a dog left of a dog", ("dog", at(500, 500))) == FLOOR


def test_a_prompt_of_several_relations_is_worth_their_mean():
    prompt = "a circle above a square and below a cross"
    circle, square, cross = ("circle", at(500, 500)), ("square", at(500, 800)), ("cross", at(500, 200))
    assert layout_score(prompt, circle, square, cross) == 1.0
    assert layout_score(prompt, circle, square, ("cross", at(200, 500))) == pytest.approx(FLOOR + 0.9 / 2)


# ---- counts ----


def row(name: str, number: int) -> list[tuple[str, Box]]:
    return [(name, Box(80 * k, 100, 80 * k + 70, 200)) for k in range(number)]


@pytest.mark.parametrize("number", range(1, 9))
def test_a_count_scores_best_where_it_is_exact_and_falls_with_the_distance(number):
    prompt = f"{WORDS[number]} {'dog' if number == 1 else 'dogs'}"
    lamp = ("lamp", Box(0, 800, 100, 900))
    scores = [layout_score(prompt, lamp, *row("dog", k)) for k in range(12)]
    assert scores[number] == 1.0
    assert all(a < b for a, b in pairwise(scores[: number + 1]))
    assert all(a > b for a, b in pairwise(scores[number:]))
    assert scores[number - 1] <= 0.6
    assert scores[number + 1] <= 0.6


@pytest.mark.parametrize("number", range(1, 9))
def test_drawn_scenes_of_a_count_are_told_from_those_of_any_other(number):
    places = [world.box_at(3 * column, 3 * line, 2) for line in range(3) for column in range(3)]
    prompt = f"{WORDS[number]} red circle{'s' * (number > 1)}"
    scores = [
        drawn_score(prompt, [world.SceneObject("circle", "red", "solid", box) for box in places[:k]])
        for k in range(1, 10)
    ]
    assert scores[number - 1] == 1.0
    assert [k for k, s in enumerate(scores, 1) if s == 1.0] == [number]
    assert scores[: number - 1] == sorted(scores[: number - 1])
    assert scores[number:] == sorted(scores[number:], reverse=True)


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 40))
def test_a_nearer_count_on_the_same_side_is_worth_more(asked, one, other):
    assume(one != other)
    assume((one - asked) * (other - asked) >= 0)
    near, far = sorted((one, other), key=lambda found: abs(found - asked))
    assert 0 <= count_value(asked, far) < count_value(asked, near) <= 1


def test_stacked_boxes_are_one_object():
    stacked = [("dog", Box(100 + k, 100, 300 + k, 300)) for k in range(3)]
    assert layout_score("three dogs", *stacked) == layout_score("three dogs", stacked[0])
    assert layout_score("three dogs", *row("dog", 3)) == 1.0


def test_several_counts_are_worth_their_mean():
    prompt = "three dogs and two cats"
    cats = [("cat", Box(80 * k, 600, 80 * k + 70, 700)) for k in range(2)]
    assert layout_score(prompt, *row("dog", 3), *cats) == 1.0
    assert layout_score(prompt, *row("dog", 3)) == pytest.approx(FLOOR + 0.9 / 2)


# ---- against the exact truth of drawn scenes ----


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1199), st.integers(0, 999))
def test_scenes_that_are_what_their_prompt_asks_for_score_one(index, seed):
    prompt = splits.load("train")[index]
    assume(read_prompt(prompt).names)
    request = parse_prompt(prompt)
    scene = compose.place(request, np.random.default_rng(seed))
    trajectory = Trajectory(
        Prompt("p", prompt),
        texts={"reasoning": compose.describe(scene, request)},
        images={"image": world.draw(scene)},
    )
    assert PlanGeometry().judge([trajectory])[0].total() == 1.0


def test_the_programmatic_judge_agrees_with_the_truth_of_faulty_layouts():
    """On the teacher's plans, wrong a third of the time, for prompts of relations alone."""
    rng = np.random.default_rng(0)
    prompts = [p for p in splits.load("train") if parse_prompt(p).category == "spatial"][:200]
    prompts = [p for p in prompts if len(read_prompt(p).relations) == len(parse_prompt(p).relations)]
    assert len(prompts) > 100
    agreed, wrong = 0, 0
    for prompt in prompts:
        shown = compose.demonstration(prompt, rng, compose.Faults(0.5, 0, 0, 0))
        trajectory = Trajectory(Prompt("p", prompt), texts={"reasoning": shown.plan_text})
        objects = truth.objects_of_plan(trajectory.plan.objects)
        exact = truth.layout_fraction(parse_prompt(prompt), objects) == 1.0
        agreed += (PlanGeometry().judge([trajectory])[0].total() == 1.0) == exact
        wrong += not exact
    assert agreed == len(prompts)
    assert wrong > 20


# ---- prompts ----


@pytest.mark.parametrize(
    ("text", "counts", "relations"),
    [
        ("a horse on the right of a man", {}, [("horse", Relation.RIGHT, "man")]),
        ("three dogs and two cats", {"dog": 3, "cat": 2}, []),
        ("a cup on top of a table", {}, [("cup", Relation.ABOVE, "table")]),
        ("a rabbit near the car", {}, [("rabbit", Relation.NEXT_TO, "car")]),
        ("3 dogs", {"dog": 3}, []),
        ("The small dog is sitting on the left of a big red car in a park.", {},
         [("small dog", Relation.LEFT, "big red car")]),
        ("a circle above a square and below a cross", {},
         [("circle", Relation.ABOVE, "square"), ("circle", Relation.BELOW, "cross")]),
        ("a ball is next to a cube and is left of a cone", {},
         [("ball", Relation.NEXT_TO, "cube"), ("ball", Relation.LEFT, "cone")]),
        ("a man in a hat is to the left of a brown horse and next to a tree", {},
         [("man", Relation.LEFT, "brown horse"), ("man", Relation.NEXT_TO, "tree")]),
        ("a red cup left of a blue cup", {}, [("red cup", Relation.LEFT, "blue cup")]),
        ("two dogs beside three cats", {"dog": 2, "cat": 3}, [("dog", Relation.NEXT_TO, "cat")]),
        ("a photo of two dogs and a cat in a park", {"dog": 2, "cat": 1}, []),
        ("four bananas, two cakes, a bicycle, four books, and a butterfly filled the pantry",
         {"banana": 4, "cake": 2, "bicycle": 1, "book": 4, "butterfly": 1}, []),
        ("six dogs played fetch in the park", {"dog": 6}, []),
        ("one truck rumbled down the highway", {"truck": 1}, []),
        ("four chairs and one giraffe provided seating at the zoo", {"chair": 4, "giraffe": 1}, []),
        ("one striped red cup and two old wooden chairs", {"striped red cup": 1, "old wooden chair": 2}, []),
        ("one oil painting and two swimming pools", {"oil painting": 1, "swimming pool": 2}, []),
        ("a fly and two bees", {"fly": 1, "bee": 2}, []),
        ("seven fish, two sheep, three people and one bus", {"fish": 7, "sheep": 2, "person": 3, "bus": 1}, []),
        ("a man wearing two hats next to a dog", {"man": 1, "hat": 2}, [("man", Relation.NEXT_TO, "dog")]),
        ("a woman holding 3 cups", {"woman": 1, "cup": 3}, []),
        ("a dog not next to a cat", {}, []),
        ("a dog not next to a cat and left of a car", {}, [("dog", Relation.LEFT, "car")]),
        ("a cup is not on top of a table and left of a plate", {}, [("cup", Relation.LEFT, "plate")]),
        ("a cat that isn't inside the box", {}, []),
        ("a dog in a park", {}, []),
        ("a horse behind a bowl", {}, []),
        ("a dog, a cat and a bird", {}, []),
        ("above a square is a circle", {}, []),
        ("the summer of 1990, one of many", {}, []),
        ("", {}, []),
    ],
)  # fmt: skip
def test_prompts_are_read(text, counts, relations):
    assert read_prompt(text) == Asked(tuple(counts.items()), tuple(relations))


@given(st.text(max_size=200))
def test_any_text_is_read_without_raising(text):
    asked = read_prompt(text)
    assert all(name for name in asked.names)
    assert all(number >= 1 for _, number in asked.counts)


@pytest.mark.parametrize(
    ("plural", "single"),
    [
        *(("dogs", "dog"), ("boxes", "box"), ("people", "person"), ("mice", "mouse"), ("knives", "knife")),
        *(("children", "child"), ("grandchildren", "grandchild"), ("women", "woman"), ("policemen", "policeman")),
        *(("glasses", "glass"), ("buses", "bus"), ("horses", "horse"), ("vases", "vase"), ("houses", "house")),
        *(("peaches", "peach"), ("brushes", "brush"), ("tomatoes", "tomato"), ("shoes", "shoe"), ("keys", "key")),
        *(("berries", "berry"), ("cookies", "cookie"), ("butterflies", "butterfly"), ("gloves", "glove")),
        *(("leaves", "leaf"), ("shelves", "shelf"), ("wolves", "wolf"), ("lenses", "lens"), ("axes", "axe")),
        *(("roses", "rose"), ("blouses", "blouse"), ("cactuses", "cactus"), ("mazes", "maze"), ("giraffes", "giraffe")),
        *(("deer", "deer"), ("sheep", "sheep"), ("fish", "fish"), ("dress", "dress"), ("bus", "bus"), ("iris", "iris")),
        *(("canvas", "canvas"), ("man", "man"), ("toes", "toe"), ("feet", "foot"), ("geese", "goose")),
    ],
)  # fmt: skip
def test_plurals_and_singulars_of_a_noun_are_one_name(plural, single):
    assert singular(plural) == single
    assert singular(single) == single


@pytest.mark.parametrize(
    ("asked", "called", "same"),
    [
        ("dog", "dogs", True),
        ("dog", "a brown dog", True),
        ("dog", "dog 2", True),
        ("dog", "dog in a hat", True),
        ("man", "old man with a dog", True),
        ("bowl", "bowl of soup", True),
        ("shoe", "pair of shoes", True),
        ("box", "boxes", True),
        ("dog", "dog bowl", False),
        ("dog", "hotdog", False),
        ("dog", "cat", False),
        ("soup", "bowl of soup", False),
        ("dog", "", False),
        ("dog", "...", False),
    ],
)
def test_planned_names_are_matched_by_their_head_noun(asked, called, same):
    assert bool(boxes_named(asked, [PlannedObject(called, at(500, 500))])) is same


def test_adjectives_tell_objects_apart_where_the_plan_has_them():
    red, blue = PlannedObject("red cup", at(200, 500)), PlannedObject("small blue cup", at(700, 500))
    assert boxes_named("red cup", [red, blue]) == [red.box]
    assert boxes_named("green cup", [red, blue]) == [red.box, blue.box]
    assert boxes_named("cup", [red, blue]) == [red.box, blue.box]
    assert name_words("the two small red cups on a table") == ("small", "red", "cup")


def test_a_prompt_that_names_neither_relation_nor_count_is_left_to_others():
    (verdict,) = PlanGeometry().judge([planned("a dog in a park", ("dog", at(500, 500)))])
    assert verdict.total() is None
    assert verdict.scores["PlanGeometry"].note.startswith("no relation or count: ")
    for without in (0.0, 1.0):
        (verdict,) = PlanGeometry(without=without).judge([planned("a dog in a park", ("dog", at(500, 500)))])
        assert verdict.total() == without
    with pytest.raises(ValueError, match="without"):
        PlanGeometry(without=2.0)


# ---- the image ----


def test_the_image_is_looked_at_once_for_all_names_and_abstains_where_one_could_not_be_seen():
    picture = Image.new("RGB", (64, 64))
    prompts = ["a dog left of a cat", "two cats", "a dog in a park"]
    rows = [Trajectory(Prompt("p", text), images={"image": picture}) for text in prompts]
    blind, seen, none = ImageGeometry(Blind()).judge(rows)
    assert blind.total() is None
    assert blind.scores["ImageGeometry"].note == "timed out: 60 s"
    assert blind.scores["ImageGeometry"].cost == {"calls": 1.0}
    assert seen.total() == pytest.approx(FLOOR + 0.9 * 0.25)
    assert none.total() is None


def test_an_image_without_any_of_the_names_is_nothing_and_no_image_is_the_policys_fault():
    empty = Image.new("RGB", (world.SIDE, world.SIDE), world.BACKGROUND)
    rows = [
        Trajectory(Prompt("p", "a red circle left of a blue square"), images=images)
        for images in ({"image": empty}, {})
    ]
    verdicts = ImageGeometry(SceneEyes()).judge(rows)
    assert [verdict.total() for verdict in verdicts] == [0.0, 0.0]
    assert [verdict.scores["ImageGeometry"].note for verdict in verdicts] == ["nothing located", "no image"]


def test_relations_of_groups_ask_every_member():
    dogs, cats = [at(100, 200), at(100, 500)], [at(400, 200), at(400, 500)]
    assert relation_value(Relation.LEFT, dogs, cats) == 1.0
    assert relation_value(Relation.NEXT_TO, dogs, cats) == 1.0
    assert relation_value(Relation.NEXT_TO, dogs, [*cats, at(900, 900)]) == pytest.approx(5 / 6)
    assert relation_value(Relation.LEFT, dogs, []) == 0.0


@pytest.mark.parametrize("judge", [PlanGeometry(), PlanGeometry(without=1.0), ImageGeometry(Blind())])
def test_the_judges_keep_the_contract(judge):
    check_judge(judge)


# ---- T2I-CompBench ----


def compbench(name: str) -> list[str]:
    lines = (COMPBENCH / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_compbench_prompts_of_relations_and_counts_are_read():
    spatial = [*compbench("spatial_train"), *compbench("spatial_val")]
    numeracy = [*compbench("numeracy_train"), *compbench("numeracy_val")]
    assert sum(len(read_prompt(text).relations) == 1 for text in spatial) == len(spatial) == 1000
    assert sum(bool(read_prompt(text).counts) for text in numeracy) >= 999
    assert not any(read_prompt(text).names for text in compbench("3d_spatial_val")), "depth is not in boxes"


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_compbench_names_are_its_own_nouns():
    listed = [line.split(" - ") for line in compbench("new_objects")]
    for single, *plural in listed:
        assert all(singular(word) == single for word in plural)
    known = {single for single, *_ in listed} | {"wallet", "flower"}
    files = ("spatial_train", "spatial_val", "numeracy_train", "numeracy_val")
    names = [name for file in files for text in compbench(file) for name in read_prompt(text).names]
    assert [name for name in names if name not in known] == []


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_every_compbench_relation_scores_true_layouts_and_fails_contradicted_ones():
    for text in compbench("spatial_val"):
        ((first, relation, second),) = read_prompt(text).relations
        fixed = SECOND.get(relation, at(500, 500))
        true, false = PATHS[relation][-1], PATHS[relation][0]
        if first == second:
            continue
        assert layout_score(text, (first, true), (second, fixed)) == 1.0, text
        assert layout_score(text, (first, false), (second, fixed)) == FLOOR, text


def test_the_paths_are_what_they_say():
    for relation, path in PATHS.items():
        second = SECOND.get(relation, at(500, 500))
        truths = [holds(relation, box, second) for box in path]
        assert truths == sorted(truths)
        assert {False, True} == set(truths)
    assert not any(box.iou(other) == 1 for path in PATHS.values() for box, other in combinations(path, 2))
