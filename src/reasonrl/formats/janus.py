"""A Janus model, or its image decoder alone, of a folder in either layout: transformers' own or `multi_modality`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reasonrl.errors import CheckpointError
from reasonrl.formats import multi_modality
from reasonrl.formats.files import first_line, last_line, read_config, read_weights

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVQVAE

DECODER = "model.vqmodel."


def is_published(folder: Path) -> bool:
    """Returns whether a folder is in the authors' layout, not in transformers'; raises CheckpointError for neither."""
    kind = read_config(folder).get("model_type")
    if kind not in ("janus", multi_modality.MODEL_TYPE):
        raise CheckpointError(
            f"{folder} is no Janus checkpoint: config.json says model_type {kind!r}, expected 'janus' or"
            f" {multi_modality.MODEL_TYPE!r}"
        )
    return kind == multi_modality.MODEL_TYPE


def load_janus(folder: Path, *, dtype: torch.dtype | None = None) -> JanusForConditionalGeneration:
    """Returns the model of a folder in a dtype, None = its config's, else its weights'; raises CheckpointError."""
    from transformers import JanusForConditionalGeneration

    published, weights = is_published(folder), read_weights(folder)
    config = multi_modality.janus_config(read_config(folder), weights) if published else _config(folder)
    weights = multi_modality.renamed(weights) if published else weights
    floats = [value.dtype for value in weights.values() if value.is_floating_point()]
    try:
        model, info = JanusForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            dtype=dtype or config.dtype or (floats[0] if floats else None),
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no Janus checkpoint: {first_line(error)}") from error
    _refuse_misfits(folder, info)
    return model


def _refuse_misfits(folder: Path, info: dict[str, Any]) -> None:
    shapes = [f"{name} {tuple(found)} where {tuple(needed)} fits" for name, found, needed in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"], "of another shape": shapes}
    problems = [f"{len(names)} weights {kind} (first: {min(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit JanusForConditionalGeneration: {', '.join(problems)}; is a shard missing, or"
            " config.json another model's?"
        )


def load_decoder(folder: Path) -> JanusVQVAE:
    """Returns the image tokens' codes and decoder alone, frozen, reading no other weights; raises CheckpointError."""
    from transformers import JanusVQVAE

    weights: dict[str, Tensor]
    if is_published(folder):
        weights = read_weights(folder, prefix="gen_")
        config = multi_modality.vq_config(read_config(folder), weights)
        weights = multi_modality.renamed(weights)
    else:
        weights, config = read_weights(folder, prefix=DECODER), _config(folder).vq_config
    model = JanusVQVAE(config)
    found = {name.removeprefix(DECODER): value for name, value in weights.items() if name.startswith(DECODER)}
    needed = model.state_dict()
    missing = sorted(set(needed) - set(found))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} VQ decoder weights, first {missing[0]}")
    wrong = sorted(name for name, value in needed.items() if found[name].shape != value.shape)
    if wrong:
        raise CheckpointError(
            f"{folder} holds {len(wrong)} VQ decoder weights of another shape (first: {wrong[0]}"
            f" {tuple(found[wrong[0]].shape)} where {tuple(needed[wrong[0]].shape)} fits); is config.json another's?"
        )
    model.load_state_dict({name: found[name] for name in needed})
    return model.eval().requires_grad_(False)


def _config(folder: Path) -> JanusConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import JanusConfig

    try:
        return JanusConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}/config.json is no Janus model's: {last_line(error)}") from error
