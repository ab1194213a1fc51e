"""A small checkpoint in the published layout, on disk: written, changed, and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.policies.original_janus import CONFIG, OriginalJanus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reasonrl import CheckpointError
from reasonrl.policies import GoTR1

SPECIAL = ["<bos>", "<eos>", "<｜▁pad▁｜>", "<begin_of_image>"]


def write_published(folder: Path, model: OriginalJanus) -> Path:
    """Writes weights, config and tokenizer."""
    folder.mkdir(exist_ok=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, *, size: int = 100) -> None:
    """Bytes, without GoT-R1's tokens and without a padding token, as Janus-Pro's."""
    # Space and line end first, so that they are among the few: turns differ by them.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", c))[: size - len(SPECIAL)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.save_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refusal(folder: Path | str) -> str:
    """Returns the one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        GoTR1(str(folder)).module  # noqa: B018
    assert "\n" not in str(error.value)
    return str(error.value)
