import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.errors import DataError
from reasonrl.scenes import codec, splits
from reasonrl.scenes.compose import NO_FAULTS, demonstration, place
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.scenes.parser import _templates
from reasonrl.scenes.world import BACKGROUND, draw

tokens_of_any_image = st.lists(st.integers(0, 1100), min_size=64, max_size=64).map(np.array)


def test_codebook_has_1101_different_patches_the_first_is_background():
    book = codec.codebook()
    assert book.shape == (1101, 8, 8, 3)
    assert book.dtype == np.uint8
    assert len({patch.tobytes() for patch in book}) == 1101
    assert (book[0] == BACKGROUND).all()


def test_first_305_patches_are_the_solid_world():
    solid = {t for tokens, kind in _templates().items() if kind[2] == "solid" for t in tokens}
    assert solid | {0} == set(range(305))


@given(tokens_of_any_image)
@settings(deadline=None, max_examples=50)
def test_tokens_survive_decoding_and_encoding(tokens):
    assert (codec.encode(codec.decode(tokens)) == tokens).all()


@given(st.sampled_from(splits.load("train")), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_scenes_survive_encoding_and_decoding(prompt, seed):
    image = draw(place(parse_prompt(prompt), np.random.default_rng(seed)))
    again = codec.decode(codec.encode(image))
    assert (np.asarray(again) == np.asarray(image)).all()


def test_nearest_removes_small_noise():
    rng = np.random.default_rng(0)
    tokens = demonstration("a red circle and a blue square", rng, NO_FAULTS).tokens
    pixels = np.asarray(codec.decode(tokens)).astype(int) + rng.integers(-3, 4, (64, 64, 3))
    noisy = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    assert (codec.nearest(noisy) == tokens).all()
    with pytest.raises(DataError, match=r"cell \(row 0, column 0\)"):
        codec.encode(noisy)


def test_unknown_patch_is_named_by_its_cell():
    image = codec.decode(np.zeros(64, int))
    image.putpixel((17, 9), (1, 2, 3))
    with pytest.raises(DataError, match=r"cell \(row 1, column 2\)"):
        codec.encode(image)


def test_other_sizes_and_ids_are_refused():
    with pytest.raises(DataError, match="64x64"):
        codec.encode(Image.new("RGB", (32, 32)))
    with pytest.raises(DataError, match="64 tokens"):
        codec.decode(np.zeros(63, int))
    with pytest.raises(DataError, match=r"0\.\.1100, got \[-1, 1101\]"):
        codec.decode(np.array([1101, -1] + [0] * 62))
