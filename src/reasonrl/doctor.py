"""Doctor: checks a recipe on one small step, before money is spent."""

from __future__ import annotations

import torch
from attrs import frozen

from reasonrl.batch import Row, collate
from reasonrl.credit import credit
from reasonrl.distributed import Solo
from reasonrl.interfaces import Trainable
from reasonrl.noise import Draw
from reasonrl.recipe import Recipe
from reasonrl.rollout import Guarded, draw_trajectories, prompts_of_step, unscored
from reasonrl.types import Trajectory

NUM_PROMPTS = 4
RATIO_TOLERANCE = 1e-3


@frozen
class Finding:
    """One thing that was looked at."""

    ok: bool
    text: str


def examine(recipe: Recipe) -> list[Finding]:
    """Returns what one step of at most four prompts shows: prompts, ratio 1, scores, groups with something to say."""
    prompts = recipe.read()
    found = [Finding(True, f"{len(prompts)} prompts read")]
    few = prompts_of_step(prompts, 0, number=min(NUM_PROMPTS, recipe.prompts_per_step), seed=recipe.seed)
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


def _ratio(trainable: Trainable, drawn: list[Trajectory]) -> list[Finding]:
    everything = frozenset(trainable.stages)
    rows = [Row(t, {}, {}, everything) for t in drawn]
    batch = collate(rows, trainable.stages, device=next(trainable.module.parameters()).device)
    wanted = {s: frozenset({"log_probs"}) for s in batch.stages if batch.stages[s].log_probs is not None}
    with torch.no_grad():
        replayed = trainable.replay(batch, wanted)
    out = []
    for name in wanted:
        stage, replay = batch.stages[name], replayed[name]
        assert replay.log_probs is not None
        assert stage.log_probs is not None
        gap = (replay.log_probs - stage.log_probs)[stage.mask].abs()
        if not len(gap):
            out.append(Finding(False, f"stage {name}: replayed no action, all {int(stage.present.sum())} were forced"))
            continue
        out.append(
            Finding(
                float(gap.max()) <= RATIO_TOLERANCE,
                f"stage {name}: replayed log-probs differ from sampled ones by at most {float(gap.max()):.1e} nats"
                f" (mean {float(gap.mean()):.1e}) over {len(gap)} actions",
            )
        )
    return out
