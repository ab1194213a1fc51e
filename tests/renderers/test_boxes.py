import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import Image
from torch import Tensor

from reasonrl.plan import MIN_SIDE, Box, Plan, PlannedObject
from reasonrl.renderers.boxes import Native, areas
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size

SIDES = st.integers(-500, 1500)
moderate = settings(max_examples=60, deadline=None)


class Spelled(Family):
    """Encodes a text as its letters, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__(None)
        self.asked: list[str] = []

    @property
    def size(self) -> Size:
        return 8, 8

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return 1, *size

    def encode(self, briefs: list[Brief], size: Size) -> list[dict[str, Tensor]]:
        self.asked += [brief.text for brief in briefs]
        return [{"embeds": torch.tensor([[float(ord(letter))] for letter in brief.text])} for brief in briefs]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        raise NotImplementedError

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> list[Image]:
        raise NotImplementedError


@moderate
@given(st.floats(0, 100))
def test_weights_add_to_one_and_give_classifier_free_guidance(guidance: float) -> None:
    weights = Native().branches(guidance)
    text, nothing = 1.7, -0.4
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert next(iter(weights)) == "full"
    mixed = weights["full"] * text + weights.get("blank", 0.0) * nothing
    assert mixed == pytest.approx(nothing + guidance * (text - nothing), abs=1e-11)


def test_guidance_of_one_is_the_full_branch_alone_and_encodes_no_negative() -> None:
    family = Spelled()
    found = Native().conditions(family, [Brief("cat"), Brief("vase")], Brief("ugly"), (8, 8), 1.0)
    assert Native().branches(1.0) == {"full": 1.0}
    assert list(found) == ["full"]
    assert [len(row["embeds"]) for row in found["full"]] == [3, 4]
    assert family.asked == ["cat", "vase"]


def test_guidance_of_zero_encodes_the_negative_alone() -> None:
    family = Spelled()
    found = Native().conditions(family, [Brief("cat")], Brief("ugly"), (8, 8), 0.0)
    assert list(found) == ["blank"]
    assert family.asked == ["ugly"]


def test_blank_branch_is_encoded_once_and_shared() -> None:
    family = Spelled()
    found = Native().conditions(family, [Brief("cat"), Brief("vase"), Brief("sun")], Brief("ugly"), (8, 8), 4.5)
    assert family.asked.count("ugly") == 1
    assert len(found["blank"]) == 3
    assert len({id(row["embeds"]) for row in found["blank"]}) == 1


@moderate
@given(SIDES, SIDES, SIDES, SIDES)
def test_area_is_the_part_of_the_box_on_the_canvas_or_nothing(x0: int, y0: int, x1: int, y1: int) -> None:
    found = areas([PlannedObject("a", Box(x0, y0, x1, y1))])
    width, height = min(x1, 1000) - max(x0, 0), min(y1, 1000) - max(y0, 0)
    assert bool(found) == (width >= MIN_SIDE and height >= MIN_SIDE)
    for _, _, (left, top, right, bottom) in found:
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert (right - left, bottom - top) == pytest.approx((width / 1000, height / 1000))


def test_what_the_parser_keeps_is_kept_as_written() -> None:
    text = "<|obj_start|>cat<|obj_end|> <|box_start|>(100,200),(300,1000)<|box_end|>"
    assert areas(Plan.parse(text).objects) == [(0, "cat", (0.1, 0.2, 0.3, 1.0))]


def test_dropped_objects_keep_their_places() -> None:
    objects = [
        PlannedObject("no box", None),
        PlannedObject("outside", Box(1100, 0, 1200, 500)),
        PlannedObject("reversed", Box(500, 500, 100, 100)),
        PlannedObject("line", Box(0, 0, 1000, 3)),
        PlannedObject("vase", Box(-50, 0, 500, 2000)),
    ]
    assert areas(objects) == [(4, "vase", (0.0, 0.0, 0.5, 1.0))]
