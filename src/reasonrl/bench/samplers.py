"""Ways to draw a group's reasoning and images: ours, transformers' `generate`, and the loop that peers write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from reasonrl.bench.measure import Stopwatch
from reasonrl.bench.models import FIRST_WORD, SPECIAL, set_image_tokens
from reasonrl.errors import ConfigError
from reasonrl.policies.janus import JanusModule, quiet
from reasonrl.policies.janus_sampler import Sampler

if TYPE_CHECKING:
    from transformers import GenerationConfig, JanusForConditionalGeneration

FLOOR = 0.1
"""Uniforms that decide words stay above it: control tokens are the first words, so no reasoning ends early."""


@frozen
class Task:
    """What is drawn: the images of one prompt's group, each after `text` words of reasoning of its own.

    Begin-of-image follows the reasoning; without reasoning the prompt's last token is begin-of-image.
    """

    group: int = 16
    prefix: int = 100
    """Tokens of the prompt."""
    text: int = 0
    image: int = 144
    guidance: float = 5.0
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if self.group < 1 or self.prefix < 2 or self.text < 0 or self.image < 1:
            raise ConfigError(
                "a task needs a group and an image of at least 1, a prefix of at least 2 and text of at least 0, got"
                f" group {self.group}, image {self.image}, prefix {self.prefix}, text {self.text}"
            )
        if self.guidance <= 1:
            raise ConfigError(
                f"--guidance must be above 1, got {self.guidance:g}: at 1 there is one branch, and transformers draws"
                " none"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group, begin-of-image not counted."""
        return self.group * (self.text + self.image)

    def prompt(self, vocab: int) -> Tensor:
        """Returns (prefix,) random words behind begin-of-text."""
        noise = torch.Generator().manual_seed(self.seed)
        words = torch.randint(FIRST_WORD, vocab, (self.prefix,), generator=noise)
        words[0] = SPECIAL.begin_text
        if not self.text:
            words[-1] = SPECIAL.begin_image
        return words

    def uniforms(self) -> tuple[Tensor, Tensor]:
        """Returns (G, text + 1) and (G, image) float64: what decides words (the last is forced) and image tokens."""
        noise = torch.Generator().manual_seed(self.seed + 1)
        size = (self.group, self.text + 1 + self.image)
        drawn = torch.rand(size, generator=noise, dtype=torch.float64)
        words, image = drawn.split([self.text + 1, self.image], 1)
        return FLOOR + (1 - FLOOR) * words, image


Draws = Callable[["JanusForConditionalGeneration", Task, Stopwatch], Tensor]
"""Returns (G, image) image tokens; all its work is in phases of the stopwatch."""


@torch.no_grad()
def reasonrl(model: JanusForConditionalGeneration, task: Task, watch: Stopwatch) -> Tensor:
    """Draws with a fresh `Sampler`, so that making its weights ready counts.

    "reasoning" holds the prompt's prefill, "image" the unconditional branch's; without reasoning "image" holds both.
    """
    sampler, prompts, (words, image) = _ready(model, task)
    if not task.text:
        with watch("image"):
            return sampler.images(prompts, task.group, image).ids
    with watch("reasoning"):
        reasoned = sampler.reason(prompts, task.group, words)
    assert bool((reasoned.lengths == task.text + 1).all()), "reasoning ended early: FLOOR is too low for this model"
    with watch("image"):
        return sampler.images_of(reasoned, 1, image).ids


@torch.no_grad()
def first_tokens(model: JanusForConditionalGeneration, task: Task, device: torch.device) -> dict[str, float]:
    """Returns our seconds to make weights ready ("prepare"), and from prompt to first token with them ("prefill")."""
    sampler, prompts, (words, image) = _ready(model, task)
    watch = Stopwatch(device)
    for phase in ("prepare", "prefill"):
        with watch(phase):
            if task.text:
                sampler.reason(prompts, task.group, words[:, :1])
            else:
                sampler.images(prompts, task.group, image[:, :1])
    took = watch.seconds
    return {"prepare": max(0.0, took["prepare"] - took["prefill"]), "prefill": took["prefill"]}


def _ready(model: JanusForConditionalGeneration, task: Task) -> tuple[Sampler, list[Tensor], tuple[Tensor, Tensor]]:
    set_image_tokens(model, task.image)
    sampler = Sampler(JanusModule(model), SPECIAL, guidance=task.guidance, temperature=1.0)
    words, image = (part.to(model.device) for part in task.uniforms())
    return sampler, [task.prompt(model.config.text_config.vocab_size)], (words, image)


@torch.no_grad()
def transformers(model: JanusForConditionalGeneration, task: Task, watch: Stopwatch) -> Tensor:
    """Draws with `generate`: generation_mode "text", then "image" with its static cache. Its prefills are in both."""
    from transformers import GenerationConfig

    set_image_tokens(model, task.image)
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": SPECIAL.pad}
    ids = task.prompt(model.config.text_config.vocab_size)[None].to(model.device)
    copies = task.group
    if task.text:
        with watch("reasoning"):
            words = GenerationConfig(max_new_tokens=task.text, num_return_sequences=task.group, **plain)
            ids = _generate(model, ids, "text", words)
            ids = torch.nn.functional.pad(ids, (0, 1), value=SPECIAL.begin_image)
        copies = 1
    with watch("image"):
        image = GenerationConfig(
            guidance_scale=task.guidance,
            num_return_sequences=copies,
            bos_token_id=SPECIAL.begin_text,
            generation_kwargs={"boi_token_id": SPECIAL.begin_image},
            **plain,
        )
        return _generate(model, ids, "image", image)


def _generate(model: JanusForConditionalGeneration, ids: Tensor, mode: str, config: GenerationConfig) -> Tensor:
    with quiet():
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_mode=mode, generation_config=config
        )
    return found


@torch.no_grad()
def plain_loop(model: JanusForConditionalGeneration, task: Task, watch: Stopwatch) -> Tensor:
    """Draws as Janus' `generation_inference`, and the trainers that copied it, do.

    Every row has its own prefix; branches are rows 0::2 and 1::2; a DynamicCache, one forward a token, softmax and
    multinomial. The images' prefill reads prompt and reasoning again, as there.
    """
    from transformers import DynamicCache

    language, images = model.model.language_model, []
    text = task.prompt(model.config.text_config.vocab_size).to(model.device).expand(task.group, -1)
    if task.text:
        text = _plain_reasoning(model, text, task.text, watch)
    with watch("prefill"):
        rows = text.repeat_interleave(2, 0)
        rows[1::2, 1:-1] = SPECIAL.pad
        cache = DynamicCache(config=language.config)
        embedded = model.get_input_embeddings()(rows)
        found = language(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    with watch("image"):
        for t in range(task.image):
            if t:
                found = language(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
            logits = model.model.generation_head(found.last_hidden_state[:, -1])
            cond, uncond = logits[0::2], logits[1::2]
            probs = torch.softmax(uncond + task.guidance * (cond - uncond), dim=-1)
            images.append(torch.multinomial(probs, num_samples=1))
            both = images[-1].repeat_interleave(2, 0)
            embedded = model.prepare_embeddings_for_image_generation(both)
    return torch.cat(images, 1)


def _plain_reasoning(model: JanusForConditionalGeneration, text: Tensor, number: int, watch: Stopwatch) -> Tensor:
    from transformers import DynamicCache

    language = model.model.language_model
    with watch("prefill"):
        cache = DynamicCache(config=language.config)
        found = language(input_ids=text, past_key_values=cache, use_cache=True)
    with watch("reasoning"):
        for t in range(number):
            if t:
                found = language(input_ids=text[:, -1:], past_key_values=cache, use_cache=True)
            probs = torch.softmax(model.lm_head(found.last_hidden_state[:, -1]), dim=-1)
            text = torch.cat([text, torch.multinomial(probs, num_samples=1)], 1)
        return torch.nn.functional.pad(text, (0, 1), value=SPECIAL.begin_image)


OURS = "reasonrl"
SAMPLERS: dict[str, Draws] = {OURS: reasonrl, "transformers generate": transformers, "plain loop": plain_loop}
