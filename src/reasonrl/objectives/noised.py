"""Noised points: clean latents carried forward in time, where objectives without likelihoods ask for a velocity.

The flow's convention: x_t = (1 − t) x0 + t ε with t in [0, 1], 1 = noise, so the velocity's target is ε − x0. A model
of another parametrisation converts its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from attrs import evolve, validators
from torch import Tensor

from reasonrl.batch import spread
from reasonrl.errors import ContractError
from reasonrl.noise import Draw, normal, uniform
from reasonrl.types import Member, Replay, Stage

CLEAN = "clean"
"""A trainable records it in `Segment.context`: x0, the latent that was decoded, shaped as one action."""
ADDRESS = "address"
"""A trainable records it in `Segment.context`: `draw.key("", (), stage)` of the step's draw, () int64. A stage knows
its rows' prompts and members, but not the step: this is what makes each step's points new."""
NOISED = "noised"
"""`prepare` adds it to `Stage.context`: x_t of each trained action, (N, T, ...); 0 where the mask is False."""
TIMES = "times"
"""`prepare` adds it to `Stage.context`: t of each trained action, (N, T); 0 where the mask is False."""
TARGET = "target"
"""`prepare` adds it to `Stage.context`: ε − x0 of each trained action, (N, T, ...). For the loss, not for replay."""
VELOCITY = "velocity"
"""Replay returns it in `Replay.extras`: v(x_t, t), shaped as `noised`, exact where the mask is True."""

Times = Literal["uniform", "logit-normal"]
"""How t is drawn: uniform in [0, 1), or the sigmoid of a standard normal (SD3, arXiv 2403.03206). A shift s
then moves it to s t / (1 + (s − 1) t), as there: above 1, more noise."""
TIMES_VALIDATOR = validators.in_(get_args(Times))


def keep(step: int) -> float:
    """Returns 1, the decay of a copy that stays as it began: the reference."""
    return 1.0


def with_points(stage: Stage, *, times: Times, shift: float, shared: bool = False) -> Stage:
    """Returns a stage that also holds NOISED, TIMES and TARGET, one point a trained action.

    A point is a function of the step, the row's prompt and member, the stage and the action's place: other rows,
    padding, micro-batches, processes and weights do not move it. `shared`: the rows of a group get one t and one ε
    at each place. Computed in float32 or better. Raises ContractError where the stage lacks CLEAN or ADDRESS.
    """
    rows, places = (index.tolist() for index in stage.mask.nonzero(as_tuple=True))
    recorded = _recorded(stage, CLEAN)
    example = next(latent for latent in recorded if latent is not None)
    device, dtype = stage.mask.device, torch.promote_types(example.dtype, torch.float32)
    # Rows without a trained action are not touched: what is in them may be anything.
    clean = torch.stack([recorded[n] for n in rows] or [example])[: len(rows)].to(device, dtype)
    t = _times(_keys(stage, rows, places, "time", shared=shared), times, shift).to(device, dtype)
    noise = normal(_keys(stage, rows, places, "noise", shared=shared), *example.shape).to(device, dtype)
    wide = t.reshape(-1, *[1] * example.ndim)
    points = {NOISED: (1 - wide) * clean + wide * noise, TIMES: t, TARGET: noise - clean}
    laid_out = {name: spread(values, stage.mask) for name, values in points.items()}
    return evolve(stage, context={**stage.context, **laid_out})


def trained(stage: Stage, name: str) -> Tensor:
    """Returns what `prepare` added under this name, at the K trained actions: (K,) or (K, D)."""
    if not isinstance(found := stage.context.get(name), Tensor):
        raise ContractError(
            f"stage {stage.name!r} has no noised points, only {sorted(stage.context)}: call prepare(stage) before"
            " loss(stage), and claim one stage alone"
        )
    picked = found[stage.mask]
    return picked if found.ndim == 2 else picked.flatten(1)


def velocity(replay: Replay, stage: Stage) -> Tensor:
    """Returns (K, D) velocities at the K trained actions, in float32 or better."""
    found = replay.extras[VELOCITY]
    if found.shape != stage.context[NOISED].shape:
        raise ContractError(
            f"replay of {stage.name!r} returned a velocity of {tuple(found.shape)}, expected"
            f" {tuple(stage.context[NOISED].shape)}: one for each of the noised points"
        )
    return found[stage.mask].flatten(1).to(torch.promote_types(found.dtype, torch.float32))


def per_action(values: Tensor, mask: Tensor) -> Tensor:
    """Returns (K,) of (N,) values: a row's value at each of its trained actions."""
    return values[:, None].expand(mask.shape)[mask]


def _times(keys: Sequence[int], times: Times, shift: float) -> Tensor:
    t = uniform(keys) if times == "uniform" else normal(keys).double().sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def _recorded(stage: Stage, name: str) -> Sequence[Tensor]:
    if name not in stage.context:
        raise ContractError(
            f"stage {stage.name!r} records {sorted(stage.context)} and no {name!r}: noised points need"
            f" {CLEAN!r} (the clean latent) and {ADDRESS!r} (draw.key('', (), stage)) in Segment.context"
        )
    found: Sequence[Tensor] = stage.context[name]
    return found


def _keys(stage: Stage, rows: Sequence[int], places: Sequence[int], use: str, *, shared: bool) -> list[int]:
    """Returns one key for noise a trained action, at (row, place); `shared`: one a group and place."""
    step = {n: Draw(0, int(_recorded(stage, ADDRESS)[n])) for n in set(rows)}
    owner = _first_of_groups(stage, set(rows)) if shared else {n: stage.keys[n] for n in set(rows)}
    return [step[n].key(*owner[n], stage.name, f"{use}/{t}") for n, t in zip(rows, places, strict=True)]


def _first_of_groups(stage: Stage, rows: set[int]) -> dict[int, tuple[str, Member]]:
    """Returns an address for each row that its group shares: the first of its prompts, and no member."""
    groups = stage.groups.tolist()
    first: dict[int, str] = {}
    for n in rows:
        prompt = stage.keys[n][0]
        first[groups[n]] = min(prompt, first.get(groups[n], prompt))
    return {n: (first[groups[n]], ()) for n in rows}
