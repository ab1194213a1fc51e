"""The nano checkpoint: a small configuration of the Janus class and a word-level tokenizer of the drawn world.

`build` writes it untrained; `examples/nano_sft.py` trains the one that is packaged in `scenes/nano/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrl.scenes import codec, vocabulary

if TYPE_CHECKING:
    from transformers import JanusConfig, PreTrainedTokenizerFast

BEGIN_TEXT, END_TEXT, PAD, UNKNOWN = "<|begin_text|>", "<|end_text|>", "<|pad|>", "<|unknown|>"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
MARKS = ("<|obj_start|>", "<|obj_end|>", "<|box_start|>", "<|box_end|>")
SENTENCE = "Follow the caption to generate an image through a chain of thought process:"
EDGES = range(0, 1001, 125)
"""Box edges of the drawn world: multiples of 125 of 1000."""


def build(folder: Path, *, seed: int = 0) -> None:
    """Writes an untrained checkpoint: config.json, model.safetensors and tokenizer files."""
    import torch
    from transformers import JanusForConditionalGeneration

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(build_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the world's words, the coordinates of its grid, and GoT-R1's marks.

    A box (125,250),(375,500) is four tokens: "(125," "250)," "(375," "500)".
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, BEGIN_TEXT, END_TEXT, BEGIN_IMAGE, END_IMAGE, IMAGE]
    corners = [f"({x}," for x in EDGES] + [f"{y})," for y in EDGES] + [f"{y})" for y in EDGES]
    words = [w for w in vocabulary.words() if w not in corners]
    vocab = {token: i for i, token in enumerate([*special, *MARKS, SENTENCE, *corners, *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\(\d+,|\d+\),|\d+\)|[a-z]+(?:[-'][a-z]+)*|\S"), behavior="removed", invert=True
    )
    inner.decoder = _decoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BEGIN_TEXT,
        eos_token=END_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={
            "boi_token": BEGIN_IMAGE,
            "eoi_token": END_IMAGE,
            "image_token": IMAGE,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    # Ordinary added tokens, as in GoT-R1's tokenizer; the fixed sentence of the prompt is one token here.
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in (*MARKS, SENTENCE)])
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """Returns a Janus configuration of about 1.2M parameters: 64 image tokens of a patch codebook.

    The vision tower and the VQ decoder are as small as the class allows: the drawn world needs neither.
    """
    from transformers import JanusConfig

    width = 128
    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 64,
            "patch_size": 8,
            "mlp_ratio": 1.0,
            "projection_dim": width,
            "num_image_tokens": 64,
            "depth": 1,
        },
        vq_config={
            "embed_dim": 32,
            "num_embeddings": len(codec.codebook()),
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": width,
            "image_token_embed_dim": width,
            "num_hidden_layers": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )


def _decoder() -> Any:
    """Returns a decoder that prints GoT-R1's wire form: no space inside marks or boxes."""
    from tokenizers import decoders as d

    glued = [
        ("<|obj_start|> ", "<|obj_start|>"),
        (" <|obj_end|>", "<|obj_end|>"),
        ("<|box_start|> ", "<|box_start|>"),
        (" <|box_end|>", "<|box_end|>"),
        (", (", ",("),
    ]
    corners = [(f"({x}, ", f"({x},") for x in EDGES]
    # WordPiece puts a space before every token but the first; Fuse joins them, so that Replace sees the whole text.
    steps = [
        d.WordPiece(prefix="##", cleanup=False),
        d.Fuse(),
        *(d.Replace(a, b) for a, b in glued + corners),
    ]
    return d.Sequence(steps)
