"""Janus models by size, with random weights: time and memory do not ask what the weights have learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from attrs import frozen

from reasonrl.errors import ConfigError
from reasonrl.policies.janus import SpecialTokens, quiet

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusForConditionalGeneration

SPECIAL = SpecialTokens(begin_text=2, end_text=3, pad=0, begin_image=4)
"""Those of the packaged tokenizer."""
FIRST_WORD = 16
"""Prompts are words from here on: none is a control token."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@frozen
class Size:
    """What time and memory depend on. Both image layers, `generation_head` and aligner, are as wide as the model."""

    name: str
    width: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    image_vocab: int
    image_tokens: int
    """A square number."""

    @property
    def parameters(self) -> int:
        """Of the language model, its word head not included."""
        layer = 4 * self.width**2 + 3 * self.width * self.intermediate + 2 * self.width
        return self.vocab * self.width + self.layers * layer + self.width


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 64, 2, 4, 128, 640, 300, 16),
        Size("heads", 512, 4, 8, 1408, 102400, 16384, 144),  # few layers under the heads of Janus-Pro
        Size("90m", 768, 12, 12, 2048, 6400, 16384, 144),  # 89.9M: 84.9M in the layers, 4.9M embeddings
        Size("1b", 2048, 24, 16, 5632, 102400, 16384, 576),  # Janus-Pro-1B
        Size("7b", 4096, 30, 32, 11008, 102400, 16384, 576),  # Janus-Pro-7B
    )
}


def named_size(name: str) -> Size:
    """Returns a size; raises ConfigError for a name that is none."""
    if name not in SIZES:
        raise ConfigError(f"--size takes one of {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]


def named_dtypes(names: str) -> list[str]:
    """Returns the dtypes of "bfloat16,float32"; raises ConfigError for one that is none."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found or any(name not in DTYPES for name in found):
        raise ConfigError(f"--dtype takes {', '.join(DTYPES)} with commas between them, got {names!r}")
    return found


def build(size: Size, *, dtype: str, device: torch.device, seed: int = 0) -> JanusForConditionalGeneration:
    """Returns a model whose weights are drawn on their device in their dtype: no second copy, the same for a seed."""
    from transformers import JanusForConditionalGeneration

    with quiet(), _made_as(DTYPES[dtype], device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return JanusForConditionalGeneration(_config(size)).eval()


def set_image_tokens(model: JanusForConditionalGeneration, number: int) -> None:
    """Sets how many tokens an image has."""
    for config in (model.model.config.vision_config, model.model.vision_model.config):
        config.num_image_tokens = number


@contextmanager
def _made_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _config(size: Size) -> JanusConfig:
    """Returns Janus-Pro's configuration in another size; the tower that sees and the image decoder do not matter."""
    from transformers import JanusConfig

    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": size.vocab,
            "hidden_size": size.width,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-6,
            "pad_token_id": SPECIAL.pad,
            "bos_token_id": SPECIAL.begin_text,
            "eos_token_id": SPECIAL.end_text,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": round(size.image_tokens**0.5),
            "patch_size": 1,
            "mlp_ratio": 1.0,
            "projection_dim": size.width,
            "num_image_tokens": size.image_tokens,
            "depth": 1,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": size.image_vocab,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": size.width,
            "image_token_embed_dim": size.width,
            "num_hidden_layers": 2,
        },
        image_token_id=1,
        tie_word_embeddings=False,
    )
