import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import DataError
from reasonrl.scenes import codec, parser, splits
from reasonrl.scenes.compose import place
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.scenes.world import Scene, draw

prompts = st.sampled_from(splits.load("train") + splits.load("longer"))


def in_order(objects):
    return tuple(sorted(objects, key=lambda o: (o.box.y0, o.box.x0)))


@given(prompts, st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_every_scene_is_read_back_exactly(prompt, seed):
    scene = place(parse_prompt(prompt), np.random.default_rng(seed))
    assert parser.read_image(draw(scene)) == parser.Reading(in_order(scene.objects), 0)


@given(prompts, st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=200)
def test_one_corrupted_cell_removes_exactly_one_object(prompt, seed, data):
    scene = place(parse_prompt(prompt), np.random.default_rng(seed))
    tokens = codec.encode(draw(scene))
    cell = data.draw(st.sampled_from(np.flatnonzero(tokens).tolist()))
    tokens[cell] = data.draw(st.integers(0, 1100).filter(lambda t: t != tokens[cell]))
    reading = parser.read_tokens(tokens)
    assert len(reading.objects) == len(scene.objects) - 1
    assert set(reading.objects) < set(scene.objects)
    assert reading.num_stray > 0


def test_random_tokens_hold_no_objects():
    rng = np.random.default_rng(5)
    for density in (0.05, 0.15, 0.3, 1.0):
        for _ in range(300):
            noise = np.where(rng.random(64) < density, rng.integers(1, 1101, 64), 0)
            reading = parser.read_tokens(noise)
            assert reading.objects == ()
            assert reading.num_stray == np.count_nonzero(noise)


@given(prompts, prompts, st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_objects_read_from_colliding_scenes_still_make_a_scene(one, two, seed):
    rng = np.random.default_rng(seed)
    first, second = (codec.encode(draw(place(parse_prompt(p), rng))) for p in (one, two))
    reading = parser.read_tokens(np.where(second != 0, second, first))
    redrawn = codec.encode(draw(Scene(reading.objects)))
    merged = np.where(second != 0, second, first)
    assert (merged[redrawn != 0] == redrawn[redrawn != 0]).all()
    assert reading.num_stray == np.count_nonzero(merged) - np.count_nonzero(redrawn)


def test_a_patch_that_no_object_has_is_stray():
    image = codec.decode(np.zeros(64, int))
    image.putpixel((0, 0), (1, 2, 3))
    assert parser.read_image(image) == parser.Reading((), 1)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(DataError, match="64 tokens"):
        parser.read_tokens(np.zeros(8, int))
