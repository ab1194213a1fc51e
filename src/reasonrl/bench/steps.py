"""Ways to the same gradient of a rollout: ours, through the loop's own pass, and the whole logits that peers make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen
from torch import Tensor

from reasonrl.batch import Row, collate, trained_mask
from reasonrl.bench.measure import Stopwatch
from reasonrl.bench.models import FIRST_WORD, SPECIAL
from reasonrl.bench.samplers import SAMPLERS, Draws, Task
from reasonrl.errors import ConfigError
from reasonrl.loop import pass_loss
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.policies.janus import JanusModule, Loader
from reasonrl.policies.trained_parts import PARTS, Trained
from reasonrl.types import Prompt, Segment, Trajectory
from reasonrl.weights import Weights

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

CHECKPOINT = "random weights"


@frozen
class Job:
    """A rollout to learn from, and how."""

    task: Task
    rank: int = 32
    """Of the adapters that learn; 0 = every weight learns."""
    recomputes: bool = True
    """Gradient checkpointing, for every contender."""
    num_rows: int | None = None
    """Trajectories that ours takes at once; None = all. Peers take all."""

    def __attrs_post_init__(self) -> None:
        if self.task.text < 1 or self.rank < 0 or (self.num_rows is not None and self.num_rows < 1):
            raise ConfigError(
                "a step needs reasoning and rows of at least 1, and a rank of at least 0, got"
                f" text {self.task.text}, rows {self.num_rows}, rank {self.rank}"
            )

    @property
    def trained(self) -> Trained:
        """What learns: adapters and nothing else, or all of it."""
        parts = ("language_model",) if self.rank else tuple(PARTS)
        return Trained(parts, rank=self.rank, recomputes=self.recomputes)


@frozen(eq=False)
class Rollout:
    """The same for every contender: random tokens, as random weights nearly draw them, and random credit."""

    prompt: Tensor
    """(prefix,)."""
    words: Tensor
    """(G, text + 1), begin-of-image last: it is forced, and not trained."""
    image: Tensor
    """(G, image)."""
    advantages: Tensor
    """(G,) float32."""


def rollout(task: Task, *, vocab: int, image_vocab: int) -> Rollout:
    """Returns what is learned from."""
    noise = torch.Generator().manual_seed(task.seed + 2)
    words = torch.randint(FIRST_WORD, vocab, (task.group, task.text + 1), generator=noise)
    words[:, -1] = SPECIAL.begin_image
    image = torch.randint(image_vocab, (task.group, task.image), generator=noise)
    return Rollout(task.prompt(vocab), words, image, torch.randn(task.group, generator=noise))


Accumulates = Callable[[Stopwatch], None]
"""Adds the gradient of minus the token mean of A·π/π_old; its phases are "forward" and "backward"."""
Learner = Callable[["JanusForConditionalGeneration", Rollout, Job, float], Accumulates]
"""Gets the guidance of the log-probs last; 1 = conditional."""


def prepare(model: JanusForConditionalGeneration, job: Job) -> None:
    """Sets what learns. Adapters begin away from 0, so that both their halves have a gradient."""
    job.trained.prepare(model)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=noise) * 0.02)


def reasonrl(model: JanusForConditionalGeneration, data: Rollout, job: Job, guidance: float) -> Accumulates:
    """Learns as `loop.train` does: GRPO over both stages' actions joined, `num_rows` trajectories a pass."""
    policy = _policy(model, job, guidance)
    weights = Weights(policy, {})
    claims = {policy.stages: GRPO()}
    rows = _rows(data, policy.stages)
    counts = {claim: objective.count(trained_mask(rows, claim)) for claim, objective in claims.items()}

    def accumulate(watch: Stopwatch) -> None:
        size = job.num_rows or len(rows)
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], policy.stages, device=model.device)
            with watch("forward"):
                loss, _ = pass_loss(claims, policy, batch, weights, counts)
            with watch("backward"):
                loss.backward()

    return accumulate


def _policy(model: JanusForConditionalGeneration, job: Job, guidance: float) -> GoTR1:
    """Returns a policy of this model, which no folder holds; its tokenizer is the packaged one."""
    policy = GoTR1(
        CHECKPOINT,
        guidance=guidance,
        trained=job.trained.parts,  # type: ignore[arg-type]  # attrs' plugin takes `tuple` for a generic function
        lora_rank=job.rank,
        gradient_checkpointing=job.recomputes,
    )
    loaded = (JanusModule(model), GoTR1().tokenizer)
    return evolve(policy, loader=Loader((CHECKPOINT, job.trained, policy.dtype), loaded))


def _rows(data: Rollout, stages: tuple[str, ...]) -> list[Row]:
    """Returns credited trajectories; without recorded log-probs the ratio is 1, as in peers that update once."""
    reasoning, image = stages
    prompt, context = Prompt("0", "random words"), {"prompt_ids": data.prompt}
    rows = []
    for g, (words, codes) in enumerate(zip(data.words, data.image, strict=True)):
        drawn = torch.ones(len(words), dtype=torch.bool)
        drawn[-1] = False
        segments = {
            reasoning: Segment(reasoning, (g,), words, drawn, None, context),
            image: Segment(image, (g,), codes, torch.ones_like(codes).bool(), None, {"blank": torch.tensor(False)}),
        }
        credit = dict.fromkeys(stages, float(data.advantages[g]))
        trajectory = Trajectory(prompt, (g,), segments)
        rows.append(Row(trajectory, credit, dict.fromkeys(stages, 0), frozenset(stages)))
    return rows


def whole_logits(model: JanusForConditionalGeneration, data: Rollout, job: Job, guidance: float) -> Accumulates:
    """Learns as T2I-R1's trainer does, from the whole group at once.

    A forward for the reasoning, with the word head over every position; one for text and image, and under guidance
    one more for its unconditional branch. All keep every layer's states (`output_hidden_states`). Logits are in the
    model's dtype, a log_softmax a row of all of them; the surrogate is exp(logp − logp.detach())·A. T2I-R1 has no
    guidance in its log-probs: guidance 1 is what it trains.
    """
    device, number = model.device, job.task.text
    words, image = data.words.to(device), data.image.to(device)
    text = torch.cat([data.prompt.to(device).expand(len(words), -1), words], 1)
    blind = text.clone()
    blind[:, 1:-1] = SPECIAL.pad
    advantages = data.advantages.to(device)[:, None]

    def accumulate(watch: Stopwatch) -> None:
        with watch("forward"):
            spoken = text[:, :-1]  # begin-of-image is forced
            logits = model.lm_head(_last_states(model, model.get_input_embeddings()(spoken)))
            log_probs = [_per_row(logits[:, :-1], spoken[:, 1:])[:, -number:]]
            logits = _image_logits(model, text, image)
            if guidance != 1.0:
                uncond = _image_logits(model, blind, image)
                logits = uncond + guidance * (logits - uncond)
            log_probs.append(_per_row(logits, image))
            found = torch.cat(log_probs, 1)
            loss = -(torch.exp(found - found.detach()) * advantages).mean()
        with watch("backward"):
            loss.backward()

    return accumulate


def _image_logits(model: JanusForConditionalGeneration, text: Tensor, image: Tensor) -> Tensor:
    """Returns (G, T, V) logits of image tokens behind their text."""
    embedded = [model.get_input_embeddings()(text), model.prepare_embeddings_for_image_generation(image)]
    states = _last_states(model, torch.cat(embedded, 1))
    logits: Tensor = model.model.generation_head(states[:, -image.shape[1] - 1 : -1])
    return logits


def _last_states(model: JanusForConditionalGeneration, embedded: Tensor) -> Tensor:
    mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
    found = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, use_cache=False, output_hidden_states=True
    )
    states: Tensor = found.hidden_states[-1]
    return states


def _per_row(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns (G, T) log-probs of tokens, in the logits' dtype."""
    rows = zip(logits, tokens, strict=True)
    return torch.stack([row.log_softmax(-1).gather(1, ids[:, None]).squeeze(1) for row, ids in rows])


@frozen
class Contender:
    """A way to learn, with the sampler that comes with it."""

    learns: Learner
    samples: Draws
    guided: bool = True
    """Whether log-probs are those of the guided distribution that was drawn from."""

    def accumulates(self, model: JanusForConditionalGeneration, data: Rollout, job: Job) -> Accumulates:
        """Returns the step's gradient, ready to be computed."""
        return self.learns(model, data, job, job.task.guidance if self.guided else 1.0)


OURS, OURS_CONDITIONAL = "reasonrl", "reasonrl, conditional"
PEERS, PEERS_CONDITIONAL = "whole logits", "whole logits, conditional"
LEARNERS = {
    OURS: Contender(reasonrl, SAMPLERS["reasonrl"]),
    PEERS: Contender(whole_logits, SAMPLERS["plain loop"]),
    OURS_CONDITIONAL: Contender(reasonrl, SAMPLERS["reasonrl"], guided=False),
    PEERS_CONDITIONAL: Contender(whole_logits, SAMPLERS["plain loop"], guided=False),
}
