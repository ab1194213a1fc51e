"""Janus-Pro-1B and 7B at full size, on the meta device: every name and shape, no memory."""

import math
from functools import cache

import pytest
import torch
from attrs import evolve
from tests.policies.janus_sizes import PRO_1B, PRO_7B, TINY, Sizes
from tests.policies.original_janus import OriginalJanus
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration

from reasonrl.formats.multi_modality import UNUSED, janus_config, renamed
from reasonrl.policies.trained_parts import Trained

REAL = pytest.mark.parametrize("sizes", [PRO_1B, PRO_7B], ids=["1B", "7B"])


@cache
def published(name: str) -> dict[str, Tensor]:
    """The weights of a published checkpoint, without their values."""
    with torch.device("meta"):
        return OriginalJanus({"1B": PRO_1B, "7B": PRO_7B}[name]).state_dict()


def weights_of(sizes: Sizes) -> dict[str, Tensor]:
    return published("1B" if sizes is PRO_1B else "7B")


def read_as(sizes: Sizes) -> JanusConfig:
    return janus_config(sizes.config, weights_of(sizes))


def meta_model(config: JanusConfig) -> JanusForConditionalGeneration:
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


@REAL
def test_every_weight_finds_its_name_and_shape(sizes):
    found = {name: tuple(value.shape) for name, value in renamed(weights_of(sizes)).items()}
    wanted = {name: tuple(value.shape) for name, value in meta_model(read_as(sizes)).state_dict().items()}
    assert found == wanted


@REAL
def test_nothing_is_left_out_but_what_is_known_to_be_unused(sizes):
    weights = weights_of(sizes)
    left = {name: value for name, value in weights.items() if UNUSED.fullmatch(name)}
    assert set(left) == {name for name in weights if ".attn_pool." in name or name.endswith("codebook_used")}
    kept = sum(value.numel() for value in renamed(weights).values())
    assert kept == sum(value.numel() for name, value in weights.items() if name not in left)


@REAL
def test_the_config_is_read_right(sizes):
    config = read_as(sizes)
    text, vision, codes = config.text_config, config.vision_config, config.vq_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (sizes.width, sizes.mlp, sizes.layers)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (sizes.heads, sizes.heads, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.rms_norm_eps) == (102400, 16384, 1e-6)
    assert text.rope_parameters["rope_theta"] == 10000.0
    assert not text.tie_word_embeddings
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.image_size, vision.patch_size, vision.num_image_tokens, vision.mlp_ratio) == (384, 16, 576, 4.0)
    assert (vision.projection_dim, vision.depth) == (sizes.width, 2)
    assert (codes.num_embeddings, codes.embed_dim, codes.num_patches, codes.latent_channels) == (16384, 8, 24, 256)
    assert (codes.base_channels, codes.channel_multiplier, codes.num_res_blocks) == (128, [1, 1, 2, 2, 4], 2)
    assert (codes.projection_dim, codes.num_hidden_layers, codes.image_token_embed_dim) == (sizes.width, 2, sizes.width)


@pytest.mark.parametrize(
    ("sizes", "every", "adapters"),
    [(PRO_1B, 2_076_636_811, 30_277_632), (PRO_7B, 7_407_773_323, 74_956_800)],
    ids=["1B", "7B"],
)
def test_the_parameters_that_the_documentation_counts(sizes, every, adapters):
    model = meta_model(read_as(sizes))
    assert sum(p.numel() for p in model.parameters()) == every
    with torch.device("meta"):
        Trained(("language_model",), rank=32).prepare(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters


def test_a_tower_that_ends_early_is_read_off_its_weights():
    # create_siglip_vit drops layers for select_layer = -2; config.json says so nowhere that we read.
    short = evolve(TINY, tower_layers=1)
    with torch.device("meta"):
        weights = OriginalJanus(short).state_dict()
    config = janus_config(short.config, weights)
    assert config.vision_config.num_hidden_layers == 1
    assert renamed(weights).keys() == meta_model(config).state_dict().keys()


def test_image_tokens_make_a_square_of_the_decoders_side():
    for sizes in (PRO_1B, PRO_7B):
        config = read_as(sizes)
        assert math.isqrt(config.vision_config.num_image_tokens) == config.vq_config.num_patches == sizes.side == 24
