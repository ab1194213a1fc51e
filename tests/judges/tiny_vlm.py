"""Tiny random Qwen2.5-VL and Qwen3-VL checkpoints, complete enough for AutoProcessor and `transformers serve`.

Random weights never write JSON by chance, so an answer is one vocabulary entry, and the weights are arranged so that
exactly one is said: the first hidden dimension marks what is read, where only answers have a score, the second marks
an answer, where only the end of the turn has one. Which answer wins is up to the other dimensions, hence to every
token and patch read so far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Family = Literal["qwen2_5_vl", "qwen3_vl"]

DIGITS = tuple("0123456789")
YES_NO = ("yes", "no")
SCORES = tuple(f'{{"score": {score}}}' for score in range(11))
BOXES = tuple(
    json.dumps([{"bbox_2d": box, "label": "x"} for box in boxes])
    for boxes in (
        [],
        [[0, 0, 100, 100]],
        [[20, 40, 200, 220]],
        [[100, 50, 400, 300]],
        [[300, 300, 440, 440]],
        [[0, 200, 120, 440], [220, 10, 430, 180]],
        [[56, 56, 168, 280], [224, 112, 336, 336]],
    )
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' or part.type == 'image_url' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
WIDTH, HEADS, LAYERS = 64, 4, 2
GAIN = 12.0
"""How much louder attention writes than it would at random."""
READ, ANSWERED = 0, 1
"""Dimensions of the hidden state: something was read last, an answer was said last."""


def build(folder: Path, family: Family, answers: Sequence[str] = DIGITS, *, seed: int = 2) -> Path:
    """Writes a checkpoint that answers every prompt with one of `answers`, then stops; returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, answers)
    write_processor(folder, family)
    config = AutoConfig.for_model(**settings(family, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            arrange(model, tokenizer, answers)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # What published checkpoints recommend for chat, so that a judge that fails to set it aside differs.
    model.generation_config.update(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.7, top_k=20
    )
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, answers: Sequence[str]) -> Any:
    """Writes and returns a byte-level BPE: all bytes, common words of questions, and each answer as one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from reasonrl.judges import vlm

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    # Words are whole, as in a large vocabulary, so that prompts are short.
    corpus = [(vlm.__doc__ or "") + vlm.GUARD, vlm.Rubric().instruction, vlm.Boxes().instruction, "yes no Yes No"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    inner.train_from_iterator(corpus, trainer)
    single = [AddedToken(answer, normalized=False, single_word=answer.isalpha()) for answer in answers]
    inner.add_tokens([token for token in single if inner.token_to_id(token.content) is None])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_processor(folder: Path, family: Family) -> None:
    """Writes what published folders have: a picture's processing, with the family's own limits, and the video's."""
    newer = family == "qwen3_vl"
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast" if newer else "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor" if newer else "Qwen2_5_VLProcessor",
        "patch_size": 16 if newer else 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3 if newer else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if newer else [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 65536, "longest_edge": 16777216}
        if newer
        else {"shortest_edge": 3136, "longest_edge": 12845056},
    }
    video = {**images, "video_processor_type": "Qwen3VLVideoProcessor" if newer else "Qwen2VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def settings(family: Family, tokenizer: Any) -> dict[str, Any]:
    """Returns the arguments of the family's configuration, tiny."""
    newer = family == "qwen3_vl"
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
    if newer:
        text |= {"head_dim": WIDTH // HEADS}
        text["rope_parameters"] |= {"mrope_interleaved": True}
        vision |= {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    else:
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    return {"model_type": family, "text_config": text, "vision_config": vision, "tie_word_embeddings": False, **ids}


def arrange(model: Any, tokenizer: Any, answers: Sequence[str]) -> None:
    """Sets embeddings and output rows as the module says; everything else stays random, larger than at training."""
    import torch

    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    said = [tokenizer.convert_tokens_to_ids(answer) for answer in answers]
    embedded, scored = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedded.normal_()
    letters = [k for token, k in tokenizer.get_vocab().items() if len(token) == 1 and token.isalnum() and token != "Ċ"]
    words = torch.ones(len(embedded), dtype=torch.bool)
    words[letters] = False
    embedded[words] *= 0.1  # the words that all questions share say little, those that are spelt say much
    embedded[:, READ], embedded[:, ANSWERED] = 8.0, 0.0
    embedded[said, READ], embedded[said, ANSWERED] = 0.0, 60.0
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj.weight[:, READ] = 0.0
        layer.self_attn.o_proj.weight.mul_(GAIN)  # what was read before outweighs the last token, always the same
        for written in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            written[[READ, ANSWERED]] = 0.0  # no layer writes into the two
    common = usual(model, tokenizer)
    rows = torch.randn(len(said), WIDTH)
    rows -= (rows @ common)[:, None] * common  # only what sets a prompt apart decides between answers
    rows[:, READ], rows[:, ANSWERED] = 80.0, 0.0
    scored.zero_()
    scored[said] = rows
    scored[tokenizer.convert_tokens_to_ids("<|im_end|>"), ANSWERED] = 40.0


def usual(model: Any, tokenizer: Any) -> Any:
    """Returns the unit direction that last hidden states of prompts have in common, the two marks apart."""
    import torch

    texts = [
        f"Does it show {thing}?<|im_end|>\n<|im_start|>assistant\n" for thing in ("a dog", "2 boats", "fog", "ivy")
    ]
    rows = [tokenizer(text, return_tensors="pt") for text in texts]
    last = torch.stack([model.model(**row).last_hidden_state[0, -1] for row in rows]).mean(0)
    last[[READ, ANSWERED]] = 0.0
    return last / last.norm()
