"""Doctor: checks a recipe on one small step, before money is spent."""

from __future__ import annotations

import torch
from attrs import frozen

from reasonrl.batch import Row, collate
from reasonrl.credit import credit
from reasonrl.distributed import Solo, best_device
from reasonrl.interfaces import Trainable
from reasonrl.noise import Draw
from reasonrl.recipe import Recipe
from reasonrl.rollout import Guarded, draw_trajectories, prompts_of_step, unscored
from reasonrl.types import Replay, Stage, Trajectory

HALF = (torch.bfloat16, torch.float16)

NUM_PROMPTS = 4
RATIO_TOLERANCE = 1e-3
"""Most nats between a sampled and a replayed log-prob, in float32."""
LEAVES, CLIPPED = 0.2, 0.05
"""Largest share of ratios outside 1 ± 0.2 in 16 bits, where single ones may be far off."""
LOST = 0.5
"""Largest share of weights that a step of the learning rate may leave as they were."""


@frozen
class Finding:
    """One thing that was looked at."""

    ok: bool
    text: str


def examine(recipe: Recipe) -> list[Finding]:
    """Returns what one step of at most four prompts shows: prompts, ratio 1, scores, groups with something to say."""
    prompts = recipe.read()
    found = [Finding(True, f"{len(prompts)} prompts read")]
    for trainable in recipe.trainables:
        Solo(best_device()).place(trainable.module, sharded=False)
    few = prompts_of_step(prompts, 0, number=min(NUM_PROMPTS, recipe.prompts_per_step), seed=recipe.seed)
    found += [Finding(True, line) for line in recipe.policy.foretell(prompts, group_size=recipe.group_size)]
    found += [finding for t in recipe.learning for finding in _lost(t, recipe.learning_rate)]
    drawn = draw_trajectories(
        recipe.policy, recipe.renderer, few, group_size=recipe.group_size, draw=Draw(recipe.seed, 0)
    )
    found += [finding for t in recipe.trainables for finding in _ratio(t, drawn)]
    if recipe.judge is None:
        return found
    verdicts = Guarded(recipe.judge, recipe.judge_timeout_s).judge([t.shown() for t in drawn])
    blind = unscored(verdicts, recipe.trained)
    share = sum(blind) / len(blind)
    found.append(Finding(share <= recipe.max_unscored, f"{share:.0%} of trajectories unscored"))
    rows = credit(drawn, verdicts, recipe, gather=Solo().gather)
    for stage in recipe.trained:
        live = {row.groups[stage] for row in rows if row.advantages.get(stage)}
        number = len({row.groups[stage] for row in rows if stage in row.groups})
        found.append(
            Finding(
                bool(live),
                f"stage {stage}: {len(live)} of {number} groups have an advantage to learn from",
            )
        )
    return found


def _lost(trainable: Trainable, rate: float) -> list[Finding]:
    """AdamW moves a weight by about the learning rate: in 16 bits most weights are too coarse for a small one."""
    learns = [p.detach() for p in trainable.module.parameters() if p.requires_grad and p.dtype in HALF]
    if not learns:
        return []
    stays = sum(int(((p + rate == p) & (p - rate == p)).sum()) for p in learns)
    share = stays / sum(p.numel() for p in learns)
    name = str(learns[0].dtype).removeprefix("torch.")
    return [
        Finding(
            share <= LOST,
            f"{type(trainable).__name__}: a step of {rate:g} would leave {share:.0%} of the {name} weights that learn"
            " as they are; adapters (lora_rank) or float32 weights learn from every step",
        )
    ]


def _ratio(trainable: Trainable, drawn: list[Trajectory]) -> list[Finding]:
    everything = frozenset(trainable.stages)
    rows = [Row(t, {}, {}, everything) for t in drawn]
    batch = collate(rows, trainable.stages, device=next(trainable.module.parameters()).device)
    wanted = {s: frozenset({"log_probs"}) for s in batch.stages if batch.stages[s].log_probs is not None}
    with torch.no_grad():
        replayed = trainable.replay(batch, wanted)
    rounded = any(p.dtype in HALF for p in trainable.module.parameters())
    return [f for name in wanted for f in _gap(batch.stages[name], replayed[name], rounded=rounded)]


def _gap(stage: Stage, replay: Replay, *, rounded: bool) -> list[Finding]:
    assert replay.log_probs is not None
    assert stage.log_probs is not None
    gap = (replay.log_probs - stage.log_probs)[stage.mask]
    if not len(gap):
        return [Finding(False, f"stage {stage.name}: replayed no action, all {int(stage.present.sum())} were forced")]
    off = gap.exp().sub(1).abs()
    leaves = float((~(off <= LEAVES)).float().mean())  # nan leaves too
    text = (
        f"stage {stage.name}: replayed log-probs differ from sampled ones by at most {float(gap.abs().max()):.1e} nats"
        f" (mean {float(gap.abs().mean()):.1e}) over {len(gap)} actions"
    )
    if rounded:
        text += f"; in 16 bits: mean |ratio - 1| {float(off.mean()):.1e}, {leaves:.1%} outside 1 ± {LEAVES}"
    found = [Finding(leaves <= CLIPPED if rounded else float(gap.abs().max()) <= RATIO_TOLERANCE, text)]
    if stage.behaviour is not None:
        apart = (stage.log_probs - stage.behaviour)[stage.mask]
        weight = apart.exp()
        found.append(
            Finding(
                True,
                f"stage {stage.name}: trained on other log-probs than it was drawn from,"
                f" {float(apart.abs().mean()):.2f} nats off in the mean; the objective's weights have mean"
                f" {float(weight.mean()):.2f}, largest {float(weight.max()):.1f} before they are truncated",
            )
        )
    return found
