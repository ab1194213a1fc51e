"""Tiny random CLIP checkpoints, with a tokenizer of single bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

SIDE = 28


def tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: k for k, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d</w>")], model_max_length=16)


def build(folder: Path, *, seed: int = 0, act: str = "gelu") -> Path:
    """Writes a checkpoint whose embeddings are 24 wide."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "hidden_act": act,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": 14,
            "hidden_act": act,
        },
        projection_dim=24,
    )
    model = CLIPModel(config)
    for weight in model.parameters():  # the published initialisation leaves embeddings of random models alike
        if weight.ndim:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a checkpoint that computes gelu, as ViT-H-14."""
    return str(build(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="session")
def build_clip() -> Callable[..., Path]:
    """Builds another one."""
    return build


@pytest.fixture(scope="session")
def drawn() -> Image.Image:
    """A picture that is wider than high, with different sides."""
    image = Image.linear_gradient("L").resize((60, 36)).convert("RGB")
    image.paste((200, 30, 60), (0, 0, 15, 36))
    return image
