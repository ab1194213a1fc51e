"""open_clip's names of a CLIP's weights, as transformers' CLIPModel calls them.

What differs beside names: queries, keys and values are one matrix (rows in this order), and the two projections are
factors on the right (x @ proj), where a Linear keeps the transpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

_WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)")
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IGNORED = {"attn_mask"}
"""Buffers of older versions, which are computed."""


def is_open_clip(weights: Mapping[str, Tensor]) -> bool:
    """Returns whether the names are open_clip's."""
    return "visual.proj" in weights and "text_projection" in weights


def converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of an open_clip ViT as a CLIPModel's; KeyError for a name that no ViT has."""
    return {
        new: tensor.contiguous()
        for name, weight in weights.items()
        if name not in _IGNORED
        for new, tensor in _renamed(name, weight)
    }


def _renamed(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in _WHOLE:
        yield _WHOLE[name], weight
    elif name in _TRANSPOSED:
        yield _TRANSPOSED[name], weight.T
    elif (found := _BLOCK.fullmatch(name)) is not None:
        tower = "vision_model" if found[1] else "text_model"
        yield from _of_block(f"{tower}.encoder.layers.{found[2]}", found[3], found[4], weight)
    else:
        raise KeyError(name)


def _of_block(home: str, part: str, kind: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if part == "attn" and kind in ("in_proj_weight", "in_proj_bias"):
        for letter, third in zip("qkv", weight.chunk(3), strict=True):
            yield f"{home}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}", third
    elif part in _PARTS:
        yield f"{home}.{_PARTS[part]}.{kind}", weight
    else:
        raise KeyError(f"{home}: {part}.{kind}")
