"""The story of a run: read this first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import define
from torch import Tensor, nn

from reasonrl.batch import Claim, join_replays, join_stages, minibatches, passes, trained_mask
from reasonrl.credit import credit
from reasonrl.distributed import World, launched, sum_metrics
from reasonrl.errors import ConfigError
from reasonrl.interfaces import Objective, Trainable
from reasonrl.recipe import AVERAGE, Recipe
from reasonrl.rollout import Experience
from reasonrl.types import Batch, Replay
from reasonrl.weights import Weights


@define(eq=False)
class Learner:
    """What a step changes: weights, their named copies, the optimizer. This is what a checkpoint holds."""

    weights: dict[Trainable, Weights]
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, recipe: Recipe, world: World | None = None) -> Learner:
        """Returns a learner at the recipe's starting weights; a trainable without a trained stage is left alone."""
        world = world or launched()
        _refuse_torn_groups(recipe, world)
        for trainable in recipe.trainables:
            world.place(trainable.module, sharded=recipe.sharded)
        weights = {t: Weights(t, _shadows(recipe, t)) for t in recipe.learning}
        modules = [o.module for o in {id(o): o for o in recipe.claims.values()}.values() if o.module is not None]
        for module in modules:
            world.place(module, sharded=False)
        live = [p for w in weights.values() for p in w.live]
        own = [p for m in modules for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in (live, own) if group],  # apart: one step takes no mix of whole and split
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            foreach=True,
        )
        return cls(weights, optimizer, live + own)


def train(
    recipe: Recipe,
    experience: Experience,
    *,
    learner: Learner | None = None,
    world: World | None = None,
    observe: Callable[..., None] = lambda event, **facts: None,
) -> None:
    """Trains on judged trajectories, a step at a time; `experience(weights)` yields (step, trajectories, verdicts).

    `observe(event, **facts)` hears of "rollout_end", "backward_end", "update_end" and "step_end". With several
    processes, rows are this rank's part of the step, and norm and metrics are the whole step's.
    """
    world = world or launched()
    learner = learner or Learner.of(recipe, world)
    claims = recipe.claims
    for step, trajectories, verdicts in experience(learner.weights):
        # Advantages see the rewards of every rank, so that groups, and any statistic of the step, are whole.
        rows = credit(trajectories, verdicts, recipe, gather=world.gather)
        observe("rollout_end", step=step, trajectories=trajectories, verdicts=verdicts, rows=rows)
        for group in learner.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        for update in minibatches(rows, recipe.num_updates, gather=world.gather):
            # Normalisers come from masks alone: known before the first backward, the same for any micro-batch and rank.
            counts = {c: world.sum(o.count(trained_mask(update, c))).clamp(min=1) for c, o in claims.items()}
            metrics: dict[str, Tensor] = {}
            for trainable, weights in learner.weights.items():
                whole = any(o.whole_groups for c, o in claims.items() if set(c) & set(trainable.stages))
                for share, batch in passes(
                    update,
                    trainable,
                    num_rows=recipe.num_rows,
                    num_actions=recipe.num_actions,
                    whole_groups=whole,
                    gather=world.gather,
                    device=weights.live[0].device,
                ):
                    loss, sums = pass_loss(claims, trainable, batch, weights, counts)
                    (share * loss).backward()
                    for name, value in sums.items():
                        metrics[name] = metrics.get(name, torch.zeros(())) + share * value.detach().cpu()
            world.sum_gradients(learner.parameters)  # a sum, as the loss is
            observe("backward_end", step=step)
            norm = world.clip_gradients(learner.parameters, recipe.max_grad_norm)
            if torch.isfinite(norm):
                learner.optimizer.step()
            learner.optimizer.zero_grad()
            observe(
                "update_end",
                step=step,
                grad_norm=norm,
                metrics=sum_metrics(metrics, world),
                skipped=not torch.isfinite(norm),
            )
        for weights in learner.weights.values():
            weights.update(step)  # old policies and averages follow, the reference stays
        observe("step_end", step=step, learner=learner)


def pass_loss(
    claims: Mapping[Claim, Objective],
    trainable: Trainable,
    batch: Batch,
    weights: Weights,
    counts: Mapping[Claim, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns this batch's part of the step's loss, and of its metrics (each divided by its claim's count).

    One replay serves every stage of the trainable; its named weights replay first.
    """
    mine = {c: o for c, o in claims.items() if set(c) <= set(trainable.stages) and set(c) & set(batch.stages)}
    batch = _prepare(batch, mine)
    frozen: dict[str, dict[str, Replay]] = {}
    for name in weights.copies:
        if wanted := _needs(batch, {c: o for c, o in mine.items() if name in o.shadows}):
            with weights.use(name):
                frozen[name] = trainable.replay(batch, wanted)
    live = trainable.replay(batch, _needs(batch, mine))
    loss = torch.zeros((), device=weights.live[0].device)
    metrics: dict[str, Tensor] = {}
    for claim, objective in mine.items():
        shadows = {name: join_replays(frozen[name], claim) for name in objective.shadows}
        part = objective.loss(join_stages(batch, claim), join_replays(live, claim), shadows)
        loss = loss + part.total / counts[claim]
        metrics |= {f"{'+'.join(claim)}/{k}": v / counts[claim] for k, v in part.metrics.items()}
    return loss, metrics


def _refuse_torn_groups(recipe: Recipe, world: World) -> None:
    coupled = [type(o).__name__ for o in recipe.claims.values() if o.whole_groups]
    if world.size > 1 and coupled and not isinstance(recipe.group_by, str):
        raise ConfigError(
            f"{coupled[0]} needs whole groups, and group_by may join prompts of different processes: use one process,"
            " or group by prompt"
        )


def _shadows(recipe: Recipe, trainable: Trainable) -> dict[str, Callable[[int], float]]:
    mine = [o for c, o in recipe.claims.items() if set(c) & set(trainable.stages)]
    named = {name: decay for o in mine for name, decay in o.shadows.items()}
    average = recipe.average
    return named if average is None else {**named, AVERAGE: lambda step: average}


def _prepare(batch: Batch, mine: Mapping[Claim, Objective]) -> Batch:
    stages = dict(batch.stages)
    for claim, objective in mine.items():
        for name in claim:
            if name in stages:
                stages[name] = objective.prepare(stages[name])
    return Batch(batch.trajectories, stages)


def _needs(batch: Batch, mine: Mapping[Claim, Objective]) -> dict[str, frozenset[str]]:
    return {stage: o.needs for c, o in mine.items() for stage in c if stage in batch.stages}
