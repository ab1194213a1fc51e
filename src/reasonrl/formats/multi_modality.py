"""Janus checkpoints as their authors publish them (`model_type: multi_modality`), read into transformers' model.

Janus-Pro (arXiv 2501.17811) and GoT-R1 come in this layout. Only names and two shapes differ; no weight is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor

from reasonrl.errors import CheckpointError
from reasonrl.formats.files import last_line

if TYPE_CHECKING:
    from transformers import (
        JanusConfig,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
        PreTrainedTokenizerBase,
    )

MODEL_TYPE = "multi_modality"
PLAN_TOKENS = ("<|box_start|>", "<|box_end|>", "<|obj_start|>", "<|obj_end|>")
"""GoT-R1's, in the order its processor adds them: the order is their ids."""
PAD = "<｜▁pad▁｜>"
HEADS = {"siglip_large_patch16_384": 16, "siglip_so400m_patch14_384": 16, "siglip_so400m_patch14_224": 16}
"""Attention heads of the vision tower: the one size that its weights do not tell."""
UNUSED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..*|gen_vision_model\.quantize\.codebook_used|.*rotary_emb\.inv_freq"
)
_TOWER, _BLOCK = r"vision_model\.vision_tower", r"vision_model\.vision_tower\.blocks\.(\d+)"
_LAYER = r"model.vision_model.encoder.layers.\1"
_RENAMED = (
    (r"language_model\.lm_head\.(.*)", r"lm_head.\1"),
    (r"language_model\.model\.(.*)", r"model.language_model.\1"),
    (r"gen_embed\.(.*)", r"model.generation_embeddings.\1"),
    (r"gen_head\.output_mlp_projector\.(.*)", r"model.generation_head.proj_out.\1"),
    (r"gen_head\.vision_head\.(.*)", r"model.generation_head.vision_head.\1"),
    (_TOWER + r"\.patch_embed\.proj\.(.*)", r"model.vision_model.embeddings.patch_embedding.\1"),
    (_TOWER + r"\.pos_embed", r"model.vision_model.embeddings.position_embedding.weight"),
    (_TOWER + r"\.norm\.(.*)", r"model.vision_model.post_layernorm.\1"),
    (_BLOCK + r"\.norm([12])\.(.*)", _LAYER + r".layer_norm\2.\3"),
    (_BLOCK + r"\.attn\.proj\.(.*)", _LAYER + r".self_attn.projection_layer.\2"),
    (_BLOCK + r"\.(attn\.qkv|mlp\.fc[12])\.(.*)", _LAYER + r".\2.\3"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(.*)", r"model.vqmodel.encoder.down.\1"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(.*)", r"model.vqmodel.decoder.up.\1"),
    (r"gen_vision_model\.(.*)", r"model.vqmodel.\1"),
)
_LAYERS = re.compile(r"(gen_)?aligner\.layers\.(\d+)\.(weight|bias)")
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights under transformers' names; raises CheckpointError for names of another model."""
    found: dict[str, Tensor] = {}
    foreign = []
    for name, value in weights.items():
        if UNUSED.fullmatch(name):
            continue
        target = _renamed(name)
        if target is None:
            foreign.append(name)
        elif ".attn.qkv." in target:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[target.replace("attn.qkv", f"self_attn.{part}_proj")] = rows
        else:
            found[target] = value.squeeze(0) if name.endswith("pos_embed") else value
    if foreign:
        raise CheckpointError(
            f"{len(foreign)} weights are none of a Janus model's (first: {', '.join(sorted(foreign)[:3])}):"
            " is config.json another model's?"
        )
    return found


def _renamed(name: str) -> str | None:
    layer = _LAYERS.fullmatch(name)
    if layer:  # a Sequential of linear layers with activations between them
        owner = "model.generation_aligner" if layer[1] else "model.aligner"
        number = int(layer[2]) // 2
        return f"{owner}.{'fc1' if number == 0 else f'hidden_layers.{number - 1}'}.{layer[3]}"
    for pattern, replacement in _RENAMED:
        if re.fullmatch(pattern, name):
            target = re.sub(pattern, replacement, name)
            target = re.sub(r"\.mid\.([012])\.", lambda m: f".mid.{_MIDDLE[m[1]]}.", target)
            return re.sub(r"\.(down|up)\.(\d+)\.res\.", r".\1.\2.block.", target)
    return None


@frozen
class _Shapes:
    """Reads sizes off the weights' shapes: the published config names its parts and leaves out their sizes."""

    weights: Mapping[str, Tensor]

    def of(self, name: str, *, axes: int) -> list[int]:
        if name not in self.weights:
            raise CheckpointError(f"the checkpoint lacks the weight {name}: is a shard missing?")
        found = list(self.weights[name].shape)
        if len(found) != axes:
            raise CheckpointError(
                f"the weight {name} has the shape {tuple(found)}, expected {axes} axes: the file is another model's"
            )
        return found

    def number(self, pattern: str) -> int:
        """Returns one more than the largest number that the pattern captures; 0 = none."""
        found = [int(m[1]) for name in self.weights if (m := re.match(pattern, name))]
        return max(found, default=-1) + 1


def janus_config(original: Mapping[str, Any], weights: Mapping[str, Tensor]) -> JanusConfig:
    """Returns transformers' config of a published config.json and its weights; raises CheckpointError."""
    from transformers import JanusConfig

    language = _language(original)
    rows, columns = _Shapes(weights).of("language_model.model.embed_tokens.weight", axes=2)
    if (rows, columns) != (language.vocab_size, language.hidden_size):
        raise CheckpointError(
            f"config.json says {language.vocab_size} words of width {language.hidden_size}, the weights hold {rows} of"
            f" width {columns}: config and weights are of two models"
        )
    return JanusConfig(
        text_config=language,
        vision_config=vision_config(original, weights),
        vq_config=vq_config(original, weights),
        tie_word_embeddings=language.tie_word_embeddings,
    )


def _language(original: Mapping[str, Any]) -> LlamaConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    given = original.get("language_config")
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json has no language_config: it is no {MODEL_TYPE} checkpoint")
    # The authors blank with the tokenizer's padding, whatever the config says.
    left_out = ("torch_dtype", "pad_token_id")
    text = {key: value for key, value in given.items() if not key.startswith("_") and key not in left_out}
    try:
        return LlamaConfig(**{"tie_word_embeddings": False, **text})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json's language_config is no Llama's: {last_line(error)}") from error


def vision_config(original: Mapping[str, Any], weights: Mapping[str, Tensor]) -> JanusVisionConfig:
    """Returns the config of the tower that sees; raises CheckpointError."""
    from transformers import JanusVisionConfig

    shapes, tower = _Shapes(weights), "vision_model.vision_tower."
    params = _params(original, "vision_config")
    named = str(params.get("model_name", ""))
    if named not in HEADS:
        raise CheckpointError(f"vision tower {named!r} is not known: expected one of {', '.join(HEADS)}")
    width, _, patch, _ = shapes.of(tower + "patch_embed.proj.weight", axes=4)
    size = _pixels(original)
    return JanusVisionConfig(
        hidden_size=width,
        num_hidden_layers=shapes.number(rf"{re.escape(tower)}blocks\.(\d+)\."),
        num_attention_heads=HEADS[named],
        image_size=size,
        patch_size=patch,
        mlp_ratio=shapes.of(tower + "blocks.0.mlp.fc1.weight", axes=2)[0] / width,
        projection_dim=shapes.of("aligner.layers.0.weight", axes=2)[0],
        depth=shapes.number(r"aligner\.layers\.(\d+)\.") // 2 + 1,
        num_image_tokens=(size // patch) ** 2,
    )


def vq_config(original: Mapping[str, Any], weights: Mapping[str, Tensor]) -> JanusVQVAEConfig:
    """Returns the config of the image tokens and their decoder, from weights named gen_*; raises CheckpointError."""
    from transformers import JanusVQVAEConfig

    shapes, vq = _Shapes(weights), "gen_vision_model."
    size = _pixels(original)
    num_codes, width = shapes.of("gen_embed.weight", axes=2)
    levels = shapes.number(rf"{re.escape(vq)}encoder\.conv_blocks\.(\d+)\.")
    base, channels, *_ = shapes.of(vq + "encoder.conv_in.weight", axes=4)
    outs = [shapes.of(f"{vq}encoder.conv_blocks.{i}.res.0.conv1.weight", axes=4)[0] for i in range(levels)]
    return JanusVQVAEConfig(
        embed_dim=width,
        num_embeddings=num_codes,
        latent_channels=shapes.of(vq + "encoder.conv_out.weight", axes=4)[0],
        in_channels=channels,
        out_channels=shapes.of(vq + "decoder.conv_out.weight", axes=4)[0],
        base_channels=base,
        channel_multiplier=[out // base for out in outs],
        num_res_blocks=shapes.number(rf"{re.escape(vq)}encoder\.conv_blocks\.0\.res\.(\d+)\."),
        num_patches=size // 2 ** (levels - 1),
        projection_dim=shapes.of("gen_aligner.layers.0.weight", axes=2)[0],
        num_hidden_layers=shapes.number(r"gen_aligner\.layers\.(\d+)\.") // 2 + 1,
        image_token_embed_dim=shapes.of("gen_head.output_mlp_projector.weight", axes=2)[0],
    )


def _pixels(original: Mapping[str, Any]) -> int:
    """Returns the side of an image."""
    size = _params(original, "vision_config").get("image_size", 384)
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"config.json's vision_config.params.image_size is {size!r}, expected pixels, as 384")
    return size


def _params(original: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    found = original.get(part)
    if not isinstance(found, Mapping) or not isinstance(found.get("params"), Mapping):
        raise CheckpointError(f"config.json has no {part}.params: it is no {MODEL_TYPE} checkpoint")
    params: Mapping[str, Any] = found["params"]
    return params


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab: int) -> PreTrainedTokenizerBase:
    """Returns the tokenizer with GoT-R1's plan tokens and padding; raises CheckpointError if they do not fit.

    Janus-Pro's tokenizer lacks the plan tokens; its embeddings have rows to spare, and GoT-R1 was trained on those.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in PLAN_TOKENS if token not in known])
    ids = tokenizer.get_vocab()
    plan = max(ids[token] for token in PLAN_TOKENS)
    if plan >= vocab:
        raise CheckpointError(
            f"the tokenizer's plan tokens ({', '.join(PLAN_TOKENS)}) end at id {plan}, the model knows {vocab} words"
            ": tokenizer and model are of two checkpoints, or the embeddings must be made larger"
        )
    beyond = sorted((number, token) for token, number in ids.items() if number >= vocab)
    if beyond:
        raise CheckpointError(
            f"{len(beyond)} words of the tokenizer are beyond the model (first: {beyond[0][1]!r}, id {beyond[0][0]})"
            f", which has {vocab}: tokenizer and model are of two checkpoints"
        )
    if PAD in known:  # what the authors blank with; some tokenizers pad with their end of text
        tokenizer.pad_token = PAD
    return tokenizer
