"""The nano flow's latents, conditions and folders."""

import importlib.util
import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.errors import CheckpointError
from reasonrl.plan import Box, Plan, PlannedObject
from reasonrl.scenes import codec, compose, flow, parser, splits, truth
from reasonrl.scenes.flow_parts import MOST_OBJECTS, Conditioner, principal_latents

CIRCLE = PlannedObject("striped red circle", Box(125, 125, 500, 500))
SQUARE = PlannedObject("blue square", Box(625, 625, 875, 875))


@pytest.fixture(scope="module")
def latents():
    return principal_latents(flow.CHANNELS)


@pytest.fixture(scope="module")
def conditioner():
    torch.manual_seed(0)
    return Conditioner().eval()


@pytest.fixture(scope="module")
def small():
    return flow.build(seed=3, width=16, num_layers=1, heads=2)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "examples" / "nano_flow.py"
    spec = importlib.util.spec_from_file_location("example_nano_flow", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- Latents ----


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(splits.NAMES), st.integers(0, 119), st.integers(0, 2**32))
def test_drawn_scenes_come_back_from_latents_without_loss(latents, split, which, seed):
    shown = compose.demonstration(splits.load(split)[which], np.random.default_rng(seed))
    picture = codec.decode(shown.tokens)
    (back,) = latents.decode(latents.encode([picture]))
    assert back.tobytes() == picture.tobytes()


def test_every_patch_has_latents_of_its_own(latents):
    every = torch.arange(1101 + 51).reshape(18, 64) % 1101
    assert latents.tokens(latents.of_tokens(every)).equal(every)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.99))
def test_noise_under_half_the_distance_to_another_patch_changes_no_picture(latents, seed, share):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1101, (1, 64), generator=generator)
    codes = latents.codes().double()
    apart = torch.cdist(codes, codes).fill_diagonal_(torch.inf).min(1).values
    noise = torch.randn(1, flow.CHANNELS, 8, 8, generator=generator, dtype=torch.float64)
    noise *= share * 0.5 * apart[tokens].reshape(1, 1, 8, 8) / noise.norm(dim=1, keepdim=True)
    assert latents.tokens(latents.of_tokens(tokens) + noise.float()).equal(tokens)


def test_latents_of_the_teachers_scenes_have_about_unit_variance(latents):
    rng = np.random.default_rng(0)
    tokens = [compose.demonstration(p, rng).tokens for p in splits.load("train")[:200]]
    found = latents.of_tokens(torch.from_numpy(np.stack(tokens)))
    assert abs(float(found.mean())) < 0.1
    assert float(found.var()) == pytest.approx(1, abs=0.25)


def test_a_picture_of_something_else_becomes_the_nearest_patches(latents):
    grey = Image.new("RGB", (64, 64), (200, 204, 207))
    (back,) = latents.decode(latents.encode([grey]))
    assert parser.read_image(back) == parser.Reading(())


# ---- Conditions ----


def test_conditions_do_not_depend_on_the_other_rows(conditioner):
    rows = [("a red circle left of a blue square", [CIRCLE, SQUARE]), ("", []), ("a cross", []), ("", [SQUARE])]
    together = conditioner.encode(*zip(*rows, strict=True))
    for row, found in zip(rows, together, strict=True):
        (alone,) = conditioner.encode(*zip(row, strict=True))
        for name in alone:
            torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-5)


def test_words_boxes_and_names_all_count(conditioner):
    moved = PlannedObject(CIRCLE.name, Box(250, 125, 625, 500))
    renamed = PlannedObject("striped green circle", CIRCLE.box)
    texts = ["a circle", "a circle", "a circle", "a square left of a cross", "a cross left of a square", ""]
    found = conditioner.encode(texts, [[CIRCLE], [moved], [renamed], [CIRCLE], [CIRCLE], []])
    for i in range(len(found)):
        for j in range(i):
            assert (found[i]["embeds"] - found[j]["embeds"]).abs().max() > 1e-4, (i, j)


def test_places_of_absent_words_are_not_read():
    torch.manual_seed(1)
    changed = Conditioner().eval()
    (before,) = changed.encode(["a cross"], [[]])
    changed.places.data[-1] += 1
    assert same(before, *changed.encode(["a cross"], [[]]))
    changed.places.data[6] += 1  # of the first word
    assert not same(before, *changed.encode(["a cross"], [[]]))


def test_of_a_text_only_the_words_before_the_plan_are_read(conditioner):
    prompt = "a red circle left of a blue square"
    text = f"{prompt}. {Plan.of([CIRCLE, SQUARE]).text} and more words"
    with_plan, without = conditioner.encode([text, f"{prompt}."], [[CIRCLE, SQUARE]] * 2)
    assert same(with_plan, without)


def test_a_box_is_cut_to_the_canvas(conditioner):
    outside = PlannedObject("red circle", Box(-400, 500, 300, 2000))
    inside = PlannedObject("red circle", Box(0, 500, 300, 1000))
    assert same(*conditioner.encode(["", ""], [[outside], [inside]]))


@pytest.mark.parametrize("box", [Box(400, 0, 400, 500), Box(500, 500, 100, 100), Box(1200, 0, 1500, 300)])
def test_a_box_with_nothing_on_the_canvas_is_none(conditioner, box):
    empty, none = conditioner.encode(["", ""], [[PlannedObject("red circle", b)] for b in (box, None)])
    assert same(empty, none)
    assert not empty["map"].any()


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(-100, 1100)] * 4))
def test_any_box_gives_finite_conditions_and_a_map_within_it(conditioner, edges):
    box = Box(*edges)
    (found,) = conditioner.encode(["a cross"], [[PlannedObject("red cross", box)]])
    assert all(value.isfinite().all() for value in found.values())
    for y in range(8):
        for x in range(8):
            cell = Box(125 * x, 125 * y, 125 * x + 125, 125 * y + 125)
            assert bool(found["map"][:, y, x].any()) == (box.overlap(cell) > 0)


def test_articles_of_a_name_and_objects_past_the_eighth_do_not_count(conditioner):
    spoken = PlannedObject("A striped red circle", CIRCLE.box)
    assert same(*conditioner.encode(["", ""], [[spoken], [CIRCLE]]))
    full = [SQUARE] * MOST_OBJECTS
    assert same(*conditioner.encode(["", ""], [full, [*full, CIRCLE]]))


def test_the_map_does_not_depend_on_the_order_of_objects(conditioner):
    one, other = conditioner.encode(["", ""], [[CIRCLE, SQUARE], [SQUARE, CIRCLE]])
    torch.testing.assert_close(one["map"], other["map"])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 1))
def test_the_output_is_the_data_down_to_the_least_time_and_never_amplified_more(s):
    x0, eps = (torch.randn(1, 16, 8, 8, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([s], dtype=torch.float64)
    c = flow.LEAST_TIME
    output = x0 if s >= c else (1 + c - s) * x0 - (c - s) * eps
    x = (1 - s) * x0 + s * eps
    torch.testing.assert_close(flow.velocity(x, output, times), eps - x0)
    wrong = flow.velocity(x, output + 1e-3, times) - (eps - x0)
    assert wrong.abs().max() <= 1e-3 / c * (1 + 1e-6)


# ---- Folders ----


def test_a_saved_flow_loads_bit_for_bit(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = flow.load(tmp_path)
    for name in ("transformer", "conditioner", "latents"):
        before, after = getattr(small, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert same(before, after), name
    assert again.scheduler.sigmas.equal(small.scheduler.sigmas)
    assert not list(tmp_path.rglob("*.bin"))


def test_the_transformer_reloads_with_diffusers_alone(small, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    small.save_pretrained(tmp_path)
    alone = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    inputs = {
        "hidden_states": torch.randn(2, 40, 8, 8),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 14, 64),
        "pooled_projections": torch.randn(2, 64),
        "return_dict": False,
    }
    with torch.no_grad():
        assert alone(**inputs)[0].equal(small.transformer(**inputs)[0])
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler").config.num_train_timesteps == 1000


def test_building_is_a_function_of_the_seed_and_leaves_the_generator_alone(small):
    state = torch.get_rng_state()
    again, other = (flow.build(seed=seed, width=16, num_layers=1, heads=2) for seed in (3, 4))
    assert torch.get_rng_state().equal(state)
    assert same(small.transformer.state_dict(), again.transformer.state_dict())
    assert not same(small.transformer.state_dict(), other.transformer.state_dict())


def test_all_modules_move_together():
    moved = flow.build(width=16, num_layers=1, heads=2).to("meta")
    for module in (moved.transformer, moved.conditioner, moved.latents):
        assert {value.device.type for value in module.state_dict().values()} == {"meta"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json: give a folder"):
        flow.load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(CheckpointError, match="StableDiffusion3Pipeline, expected NanoFlow"):
        flow.load(tmp_path)


# ---- The script ----


def test_a_training_plan_describes_its_picture_whatever_the_text_says(script):
    with_plan = [one for one in islice(iter(script.Examples(seed=5), None), 150) if one.objects]
    assert len(with_plan) > 100
    for one in with_plan:
        seen = parser.read_tokens(one.tokens)
        assert seen.num_stray == 0
        named = truth.objects_of_plan(one.objects)
        for item in seen.objects:
            match = max(named, key=lambda plan, item=item: plan.box.iou(item.box))
            assert (match.shape, match.color, match.texture) == (item.shape, item.color, item.texture)
            assert match.box.iou(item.box) > 0.4
        assert len(named) == len(seen.objects)


def test_the_script_leaves_out_plans_and_texts_as_often_as_it_says(script):
    shown = list(islice(iter(script.Examples(seed=6), None), 600))
    bare = [(not one.objects, not one.text) for one in shown]
    for left_out, share in (((True, False), 0.15), ((False, True), 0.1), ((True, True), 0.05)):
        assert bare.count(left_out) / 600 == pytest.approx(share, abs=0.045)


def test_the_script_trains_and_saves_in_half_the_bytes(script, tmp_path, monkeypatch):
    build = partial(flow.build, width=16, num_layers=1, heads=2)
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script.flow, "build", build)
    monkeypatch.setattr(sys, "argv", ["nano_flow.py", "--out", str(tmp_path), "--steps", "2"])
    script.main()
    before, after = build(seed=0), flow.load(tmp_path)
    for name in ("transformer", "conditioner"):
        old, new = getattr(before, name), getattr(after, name)
        assert not same(old.state_dict(), new.state_dict()), name
        (file,) = (tmp_path / name).glob("*.safetensors")
        assert file.stat().st_size < 2.5 * sum(p.numel() for p in old.parameters()) + 10_000
    assert same(before.latents.state_dict(), after.latents.state_dict())


def test_a_saved_flow_does_not_say_where_it_was_loaded_from(tmp_path):
    flow.load("nano").save_pretrained(tmp_path / "once")
    flow.load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert not [path for path in tmp_path.rglob("*.json") if str(tmp_path) in path.read_text(encoding="utf-8")]
