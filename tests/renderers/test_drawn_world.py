"""The adapter of the nano flow, and what the packaged one draws."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.plan import Box, Plan, PlannedObject
from reasonrl.relations import mean_iou
from reasonrl.renderers.families.drawn_world import DrawnWorld
from reasonrl.renderers.family import Brief
from reasonrl.renderers.steps import ODE, step
from reasonrl.scenes import codec, compose, flow, grammar, parser, splits, truth
from reasonrl.scenes.world import are_apart, box_at

SIZE = (64, 64)
NUM = 64
LEAST, MOST, LEAST_IOU = 0.3, 0.65, 0.55
"""Measured at these prompts: 0.39 exact; taught in the end by a teacher who errs in two fifths of the pictures."""


@pytest.fixture(scope="module")
def family() -> DrawnWorld:
    return DrawnWorld(flow.load("nano"))


@pytest.fixture(scope="module")
def planned() -> list[Brief]:
    rng = np.random.default_rng(0)
    shown = [compose.demonstration(text, rng, compose.NO_FAULTS) for text in splits.load("test")[:NUM]]
    return [Brief(d.prompt, Plan.parse(d.plan_text).objects) for d in shown]


@pytest.fixture(scope="module")
def pictures(family, planned) -> list[Image.Image]:
    return drawn(family, planned)


def noise(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, flow.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def latents_of(family: DrawnWorld, briefs: Sequence[Brief], x: Tensor, num_steps: int = 10) -> Tensor:
    conditions = family.collate(family.encode(briefs, SIZE))
    schedule = family.schedule(num_steps, SIZE)
    for i in range(num_steps):
        v = family.predict(x, schedule.inputs[i].expand(len(x)), conditions)
        x = step(ODE(), x, v, float(schedule.times[i]), float(schedule.times[i + 1])).next
    return x


def drawn(family: DrawnWorld, briefs: Sequence[Brief], seed: int = 0) -> list[Image.Image]:
    return family.decode(latents_of(family, briefs, noise(len(briefs), seed)))


def exact(briefs: Sequence[Brief], pictures: Sequence[Image.Image]) -> float:
    pairs = zip(briefs, pictures, strict=True)
    return float(np.mean([truth.exact(grammar.parse_prompt(b.text), parser.read_image(p)) for b, p in pairs]))


# ---- The adapter ----


def test_the_drawn_world_has_one_size(family):
    assert family.size == SIZE
    assert family.latent_shape(SIZE) == (16, 8, 8)
    with pytest.raises(ConfigError, match=r"64x64, got size \(64, 128\)"):
        family.latent_shape((64, 128))


def test_times_fall_from_one_to_zero_and_are_what_the_model_is_told(family):
    schedule = family.schedule(10, SIZE)
    assert schedule.times.shape == (11,)
    assert schedule.times[0] == 1
    assert schedule.times[-1] == 0
    assert (schedule.times.diff() < 0).all()
    torch.testing.assert_close(schedule.inputs.double(), schedule.times[:-1], atol=1e-6, rtol=0)


def test_the_velocity_at_the_data_is_towards_the_noise(family, planned):
    """v = eps - x0, by the definition of the flow: at s = 0.5 the packaged flow finds both."""
    rng = np.random.default_rng(1)
    shown = [compose.demonstration(text, rng, compose.NO_FAULTS) for text in splits.load("train")[:32]]
    briefs = [Brief(d.prompt, Plan.parse(d.plan_text).objects) for d in shown]
    x0 = family.pipe.latents.of_tokens(torch.from_numpy(np.stack([d.tokens for d in shown])))
    eps = noise(32, seed=7)
    with torch.no_grad():
        v = family.predict(0.5 * x0 + 0.5 * eps, torch.full((32,), 0.5), family.collate(family.encode(briefs, SIZE)))
    assert (v - (eps - x0)).square().mean() < 0.1 * (eps - x0).square().mean()


def test_only_the_transformer_gets_a_gradient(family, planned):
    conditions = family.collate(family.encode(planned[:2], SIZE))
    family.predict(noise(2), torch.tensor([0.3, 0.8]), conditions).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in family.pipe.conditioner.parameters())
    assert family.denoiser is family.pipe.transformer
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in family.denoiser.parameters())
    family.denoiser.zero_grad()


def test_lora_is_added_as_to_stable_diffusion_3(planned):
    from peft import LoraConfig

    family = DrawnWorld(flow.load("nano"))
    before = latents_of(family, planned[:2], noise(2), num_steps=2)
    family.denoiser.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert latents_of(family, planned[:2], noise(2), num_steps=2).equal(before)
    trained = [name for name, p in family.denoiser.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def test_latents_decode_to_the_picture_that_they_encode(family, planned):
    rng = np.random.default_rng(2)
    pictures = [codec.decode(compose.demonstration(b.text, rng).tokens) for b in planned[:8]]
    back = family.decode(family.pipe.latents.encode(pictures))
    assert [p.tobytes() for p in back] == [p.tobytes() for p in pictures]


# ---- What the packaged flow draws ----


def test_the_packaged_flow_draws_most_correct_plans_exactly_and_not_all(planned, pictures):
    assert LEAST <= exact(planned, pictures) <= MOST


def test_planned_boxes_are_where_objects_are(planned, pictures):
    found = [
        mean_iou(b.objects, [PlannedObject(o.name, o.box) for o in parser.read_image(p).objects])
        for b, p in zip(planned, pictures, strict=True)
    ]
    assert float(np.mean(found)) > LEAST_IOU


def test_without_a_plan_it_draws_much_worse(family, planned, pictures):
    bare = [Brief(b.text) for b in planned[:32]]
    assert exact(bare, drawn(family, bare)) < exact(planned, pictures) - 0.2


def test_moving_a_planned_box_moves_the_object(family, planned, pictures):
    """Its new box is painted, and its old one is not; measured of 120: whole at the new place in 0.62."""
    rng = np.random.default_rng(3)
    targets, moved = zip(*(with_one_moved(brief, rng) for brief in planned), strict=True)
    after = drawn(family, moved)
    assert np.mean([painted(p, box) for p, box in zip(after, targets, strict=True)]) > 0.95
    assert np.mean([painted(p, box) for p, box in zip(pictures, targets, strict=True)]) < 0.5
    assert np.mean([shows(p, box) for p, box in zip(after, targets, strict=True)]) >= 0.5
    assert not any(shows(p, box) for p, box in zip(pictures, targets, strict=True))


def painted(picture: Image.Image, box: Box) -> float:
    """Returns the fraction of a box's cells that are not plain background."""
    tokens = codec.nearest(picture).reshape(8, 8)
    return float((tokens[box.y0 // 125 : box.y1 // 125, box.x0 // 125 : box.x1 // 125] != codec.PLAIN).mean())


def with_one_moved(brief: Brief, rng: np.random.Generator) -> tuple[Box, Brief]:
    """Returns a free place of the size that one of the plan's objects has, and the plan with the object there."""
    at = int(rng.integers(len(brief.objects)))
    item, others = brief.objects[at], brief.objects[:at] + brief.objects[at + 1 :]
    cells = int(item.box.width) // 125
    places = [box_at(x, y, cells) for x, y in product(range(9 - cells), repeat=2)]
    free = [box for box in places if box != item.box and all(are_apart(box, other.box) for other in others)]
    box = free[int(rng.integers(len(free)))]
    return box, Brief(brief.text, (*others, PlannedObject(item.name, box)))


def shows(picture: Image.Image, box: Box) -> bool:
    return any(item.box == box for item in parser.read_image(picture).objects)


def test_a_picture_does_not_depend_on_the_rest_of_the_batch(family, planned):
    x = noise(16)
    together = latents_of(family, planned[:16], x)
    alone = torch.cat([latents_of(family, planned[i : i + 1], x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together[:4], alone, atol=1e-4, rtol=1e-4)
    assert [p.tobytes() for p in family.decode(together[:4])] == [p.tobytes() for p in family.decode(alone)]
