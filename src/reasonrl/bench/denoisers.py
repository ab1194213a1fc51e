"""Ways to learn from denoising steps: ours, through the loop's own passes, and the straight loop that trainers write.

All of them draw with, and learn from, the same weights, the same noise and the same credit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from attrs import frozen
from einops import repeat
from torch import Tensor

from reasonrl.batch import Row, passes, trained_mask
from reasonrl.bench.measure import Stopwatch
from reasonrl.bench.sd3 import RandomText
from reasonrl.errors import ConfigError
from reasonrl.loop import pass_loss
from reasonrl.noise import Draw, normal
from reasonrl.objectives import DenoisingGRPO
from reasonrl.renderers import Diffusion
from reasonrl.renderers.boxes import Native
from reasonrl.renderers.family import Brief, Family
from reasonrl.renderers.pipelines import DTYPES, Learns, Loader
from reasonrl.renderers.steps import FlowSDE
from reasonrl.types import Prompt, Trajectory
from reasonrl.weights import Weights

CHECKPOINT = "random weights"
STAGE = "image"
PROMPT = Prompt("0", "random words")
DRAW = Draw(0, 0)
ETA = 0.7


@frozen
class Job:
    """What is drawn and learned from: one group of one prompt, whose first steps are random, recorded and trained."""

    group: int = 4
    steps: int = 10
    trained: int = 4
    """The first so many steps; the others follow the ODE."""
    guidance: float = 1.0
    """1 = one branch."""
    rank: int = 32
    """Of the adapters that learn; 0 = every weight learns."""
    recomputes: bool = False
    """Gradient checkpointing, for every contender."""
    num_rows: int | None = None
    """Pictures that are learned from at once; None = all."""
    clip: float = 1e-4

    def __attrs_post_init__(self) -> None:
        rows = self.group if self.num_rows is None else self.num_rows
        if min(self.group, rows, self.trained) < 1 or self.trained > self.steps or self.rank < 0 or self.guidance < 1:
            raise ConfigError(
                "a job needs a group, rows and guidance of at least 1, trained steps between 1 and all steps, and a"
                f" rank of at least 0, got group {self.group}, rows {rows}, guidance {self.guidance:g},"
                f" trained {self.trained} of {self.steps}, rank {self.rank}"
            )

    @property
    def learns(self) -> Learns:
        """What learns: adapters and nothing else, or all of it."""
        return Learns(rank=self.rank, recomputes=self.recomputes)

    @property
    def advantages(self) -> Tensor:
        """(G,) float32 random credit."""
        return torch.randn(self.group, generator=torch.Generator().manual_seed(3))


Step = Callable[[Stopwatch], float]
"""Draws, and adds the gradient of the clipped surrogate; its phases are "sample", "forward" and "backward". Returns the
mean of |ln ρ| over trained steps, which is 0 before the first update but for rounding."""


def reasonrl(family: RandomText, job: Job, dtype: str, *, num_actions: int | None) -> Step:
    """Draws and learns as `loop.train` does: `num_actions` steps of `num_rows` pictures a pass."""
    renderer = _renderer(family, job, dtype)
    weights = Weights(renderer, {})
    claims = {renderer.stages: DenoisingGRPO(clip=job.clip)}
    leaves = [Trajectory(PROMPT, (g,)) for g in range(job.group)]

    def step(watch: Stopwatch) -> float:
        with watch("sample"):
            drawn = renderer.render(leaves, draw=DRAW)
        rows = [
            Row(each, {STAGE: float(credit)}, {STAGE: 0}, frozenset({STAGE}))
            for each, credit in zip(drawn, job.advantages, strict=True)
        ]
        counts = {claim: objective.count(trained_mask(rows, claim)) for claim, objective in claims.items()}
        device = weights.live[0].device
        gap = 0.0
        with watch("forward"):  # what waited on the host comes back here
            found = passes(
                rows, renderer, num_rows=job.num_rows, num_actions=num_actions, whole_groups=False, device=device
            )
            batches = list(found)
        for share, batch in batches:
            with watch("forward"):
                loss, metrics = pass_loss(claims, renderer, batch, weights, counts)
            with watch("backward"):
                (share * loss).backward()
            gap += float(metrics[f"{STAGE}/log_ratio_size"])
        return gap

    return step


def _renderer(family: RandomText, job: Job, dtype: str) -> Diffusion:
    """Returns a renderer of this model, which no folder holds."""
    loaded: dict[object, Family] = {(CHECKPOINT, dtype, job.learns, Native()): family}
    return Diffusion(
        CHECKPOINT,
        guidance=job.guidance,
        num_steps=job.steps,
        kernel=FlowSDE(ETA),
        window="early",
        window_size=job.trained,
        dtype=dtype,  # type: ignore[arg-type]  # a key of DTYPES
        lora_rank=job.rank,
        lora_alpha=job.learns.alpha,
        gradient_checkpointing=job.recomputes,
        stage=STAGE,
        loader=Loader(loaded),
    )


def straight_loop(family: RandomText, job: Job, dtype: str) -> Step:
    """Draws and learns as trainers of denoising steps do (Flow-GRPO, DanceGRPO), without any of our parts.

    Latents stay on the device; a step at a time is predicted again, scored, clipped and sent backward. Both branches
    of guidance are one batch.
    """
    transformer, scheduler = family.denoiser, family.pipe.scheduler
    device = next(transformer.parameters()).device
    scheduler.set_timesteps(job.steps)
    sigmas = scheduler.sigmas.to(device)
    texts = family.encode([Brief(PROMPT.text), Brief("")][: 1 if job.guidance == 1 else 2], family.size)
    embeds, pooled = (torch.stack([text[name] for text in texts]).to(device, DTYPES[dtype]) for name in texts[0])
    shape = family.latent_shape(family.size)
    members = range(job.group)
    advantages = job.advantages.to(device)

    def velocity(x: Tensor, i: int) -> Tensor:
        found = transformer(
            hidden_states=repeat(x.to(DTYPES[dtype]), "n c h w -> (b n) c h w", b=len(embeds)),
            timestep=(sigmas[i] * scheduler.config.num_train_timesteps).expand(len(embeds) * len(x)),
            encoder_hidden_states=repeat(embeds, "b l d -> (b n) l d", n=len(x)),
            pooled_projections=repeat(pooled, "b d -> (b n) d", n=len(x)),
            return_dict=False,
        )[0].float()
        if len(embeds) == 1:
            return found
        with_text, without = found.chunk(2)
        return without + job.guidance * (with_text - without)

    def moments(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns mean and std of a step, as arXiv 2505.05470 has them."""
        t, dt = sigmas[i], sigmas[i] - sigmas[i + 1]
        noise_level = ETA * (t / (1 - (sigmas[1] if i == 0 else t))).sqrt()
        mean = x - dt * (v + noise_level**2 / (2 * t) * (x + (1 - t) * v))
        return mean, noise_level * dt.sqrt()

    def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return density.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def draw() -> tuple[list[Tensor], list[Tensor]]:
        """Returns T + 1 latents and the log-probs of the trained steps."""
        x = normal([DRAW.key(PROMPT.id, (g,), STAGE, "start") for g in members], *shape).to(device)
        latents, known = [x], []
        for i in range(job.steps):
            v = velocity(x, i)
            if i < job.trained:
                noise = normal([DRAW.key(PROMPT.id, (g,), STAGE, f"step/{i}") for g in members], *shape)
                mean, std = moments(x, v, i)
                x = mean + std * noise.to(device)
                known.append(log_prob(x, mean, std))
            else:
                x = x + (sigmas[i + 1] - sigmas[i]) * v
            latents.append(x)
        return latents, known

    def step(watch: Stopwatch) -> float:
        with watch("sample"):
            latents, known = draw()
        size, count = job.num_rows or job.group, job.group * job.trained
        gap = 0.0
        for start in range(0, job.group, size):
            rows = slice(start, start + size)
            for i in range(job.trained):
                with watch("forward"):
                    x = latents[i][rows]
                    found = log_prob(latents[i + 1][rows], *moments(x, velocity(x, i), i))
                    ratio = (found - known[i][rows]).exp()
                    clipped = ratio.clamp(1 - job.clip, 1 + job.clip)
                    credit = advantages[rows]
                    loss = torch.maximum(-credit * ratio, -credit * clipped).sum() / count
                with watch("backward"):
                    loss.backward()
                gap += float((found.detach() - known[i][rows]).abs().sum()) / count
        return gap

    return step


OURS, WHOLE, STRAIGHT = "reasonrl", "reasonrl, at once", "straight loop"
CONTENDERS: dict[str, Callable[[RandomText, Job, str], Step]] = {
    OURS: partial(reasonrl, num_actions=1),
    WHOLE: partial(reasonrl, num_actions=None),
    STRAIGHT: straight_loop,
}
