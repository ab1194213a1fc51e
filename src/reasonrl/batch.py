"""Rows of credited trajectories to padded tensors: the only place where padding happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from reasonrl.types import Batch, Replay, Segment, Stage, Trajectory

if TYPE_CHECKING:
    from reasonrl.interfaces import Trainable

Claim = tuple[str, ...]
"""The stages of one objective, in order."""
Gather = Callable[[list[Any]], list[Any]]
"""Returns the values of all ranks, in rank order; for one process, the values."""


@frozen(eq=False)
class Row:
    """One trajectory with its credit: advantage and group by stage, and which stages it trains.

    A draw that several trajectories share is trained in the first of them only.
    """

    trajectory: Trajectory
    advantages: Mapping[str, float]
    groups: Mapping[str, int]
    trained: frozenset[str]

    def mask(self, stage: str) -> Tensor:
        """(T,) bool: the stage's actions that are trained in this row."""
        mask = self.trajectory.segments[stage].mask
        return mask if stage in self.trained else torch.zeros_like(mask)


def collate(rows: Sequence[Row], stages: Sequence[str], *, device: torch.device | None = None) -> Batch:
    """Returns one batch of these rows with every stage that any of them has."""
    present = [s for s in stages if any(s in row.trajectory.segments for row in rows)]
    padded = {name: _stage(name, rows, device) for name in present}
    return Batch(tuple(row.trajectory for row in rows), padded)


def _stage(name: str, rows: Sequence[Row], device: torch.device | None) -> Stage:
    segments = [row.trajectory.segments.get(name) for row in rows]
    first = next(s for s in segments if s is not None)
    length = max(len(s.actions) for s in segments if s is not None)

    def padded(pick: Callable[[Row, Segment], Tensor]) -> Tensor:
        example = pick(next(r for r in rows if name in r.trajectory.segments), first)
        out = example.new_zeros(len(rows), length, *example.shape[1:])
        for i, (row, segment) in enumerate(zip(rows, segments, strict=True)):
            if segment is not None:
                out[i, : len(segment.actions)] = pick(row, segment)
        return out.to(device)

    # What draws record and demonstrations cannot have is left out where both meet.
    shared = [key for key in first.context if all(s is None or key in s.context for s in segments)]
    likelihoods = all(s is None or s.log_probs is not None for s in segments)
    return Stage(
        name=name,
        keys=tuple(
            (row.trajectory.prompt.id, () if s is None else s.member) for row, s in zip(rows, segments, strict=True)
        ),
        actions=padded(lambda _, s: s.actions),
        present=padded(lambda _, s: torch.ones_like(s.mask)),
        mask=padded(lambda row, _: row.mask(name)),
        advantages=torch.tensor([row.advantages.get(name, 0.0) for row in rows], device=device),
        groups=torch.tensor([row.groups.get(name, -1) for row in rows], device=device),
        log_probs=padded(lambda _, s: s.log_probs) if likelihoods else None,  # type: ignore[arg-type, return-value]
        context={key: [None if s is None else s.context[key].to(device) for s in segments] for key in shared},
        behaviour=padded(_behaviour) if likelihoods and any(s and s.behaviour is not None for s in segments) else None,
    )


def _behaviour(row: Row, segment: Segment) -> Tensor:
    """Returns log-probs of what drew a segment: where nothing else is recorded, those that are replayed."""
    found = segment.log_probs if segment.behaviour is None else segment.behaviour
    assert found is not None
    return found


def trained_mask(rows: Sequence[Row], claim: Claim) -> Tensor:
    """(N, T) bool: the claim's trained actions of these rows, its stages joined along T."""
    joined = [
        torch.cat([row.mask(s) for s in claim if s in row.trajectory.segments] or [torch.zeros(0, dtype=torch.bool)])
        for row in rows
    ]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True) if joined else torch.zeros(0, 0, dtype=torch.bool)


def minibatches(rows: Sequence[Row], num_updates: int, *, gather: Gather = list) -> Iterator[list[Row]]:
    """Splits rows into `num_updates` parts of whole prompts, as even as whole prompts allow.

    The prompts are those of all ranks: a part is as large as with one process, and may be empty on a rank.
    """
    prompts = list(dict.fromkeys(gather(list(dict.fromkeys(row.trajectory.prompt.id for row in rows)))))
    for part in range(min(num_updates, len(prompts))):
        mine = set(prompts[part::num_updates])
        yield [row for row in rows if row.trajectory.prompt.id in mine]


def passes(
    rows: Sequence[Row],
    trainable: Trainable,
    *,
    num_rows: int | None,
    num_actions: int | None,
    whole_groups: bool,
    gather: Gather = list,
    device: torch.device | None = None,
) -> Iterator[tuple[float, Batch]]:
    """Yields (share, batch) of one trainable's work, equally many on every rank: idle ones repeat one with share 0.

    Rows are unique by the addresses of the trainable's own draws: a plan with k images is replayed once
    by a planner and k times by a unified policy. Rows that train nothing are left out.
    """
    stages = trainable.stages
    work = [
        row for row in _unique(rows, stages) if any(row.mask(s).any() for s in stages if s in row.trajectory.segments)
    ]
    whole_by = stages if whole_groups else None
    window = num_actions if trainable.factorised else None

    def batches_of(chunk: list[Row]) -> Iterator[Batch]:
        return _windows(collate(chunk, stages, device=device), window)

    batches = [batch for chunk in _chunks(work, num_rows, whole_by) for batch in batches_of(chunk)]
    numbers = gather([len(batches)])
    idle = max(numbers) - len(batches)
    spare = batches[:1]
    if max(numbers) and not min(numbers):
        # A rank without work repeats another's: it evaluates an action, and touches no weights that nobody trains.
        lent = next(group for group in gather([_bare(next(_chunks(work, 1, whole_by), []))]) if group)
        spare = spare or [next(batches_of(lent))]
    for batch in batches:
        yield 1.0, batch
    for _ in range(idle):
        yield 0.0, spare[0]


def _bare(rows: Sequence[Row]) -> list[Row]:
    """Returns rows without what replay does not read, to send; tensors of their own, for a view is sent whole."""
    return [
        evolve(
            row,
            trajectory=evolve(
                row.trajectory,
                images={},
                artifacts={},
                segments={stage: _apart(segment) for stage, segment in row.trajectory.segments.items()},
            ),
        )
        for row in rows
    ]


def _apart(segment: Segment) -> Segment:
    return evolve(
        segment,
        actions=segment.actions.clone(),
        log_probs=None if segment.log_probs is None else segment.log_probs.clone(),
        context={name: value.clone() for name, value in segment.context.items()},
    )


def _unique(rows: Sequence[Row], stages: Sequence[str]) -> list[Row]:
    merged: dict[tuple[object, ...], Row] = {}
    for row in rows:
        segments = row.trajectory.segments
        key = (
            row.trajectory.prompt.id,
            *((s, segments[s].member) for s in stages if s in segments),
        )
        known = merged.get(key)
        merged[key] = row if known is None else evolve(known, trained=known.trained | row.trained)
    return list(merged.values())


def _chunks(rows: list[Row], num_rows: int | None, whole_by: Sequence[str] | None) -> Iterator[list[Row]]:
    if not rows:
        return
    size = num_rows or len(rows)
    if whole_by is None:
        yield from (rows[i : i + size] for i in range(0, len(rows), size))
        return
    chunk: list[Row] = []
    for group in _coupled(rows, whole_by):
        if chunk and len(chunk) + len(group) > size:
            yield chunk
            chunk = []
        chunk = chunk + group
    yield chunk


def _coupled(rows: Sequence[Row], stages: Sequence[str]) -> list[list[Row]]:
    """Returns the rows that share a group on some stage, directly or through others, together."""
    clusters: list[list[Row]] = []
    home: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        labels = [(s, row.groups[s]) for s in stages if s in row.groups]
        known = list({id(home[label]): home[label] for label in labels if label in home}.values())
        cluster = known[0] if known else []
        if not known:
            clusters.append(cluster)
        for other in known[1:]:
            cluster += other
            clusters = [c for c in clusters if c is not other]
            home = {label: cluster if c is other else c for label, c in home.items()}
        cluster.append(row)
        home |= dict.fromkeys(labels, cluster)
    return clusters


def _windows(batch: Batch, num_actions: int | None) -> Iterator[Batch]:
    """Splits the trained actions of a factorised trainable into windows of `num_actions`, by masks alone."""
    if num_actions is None:
        yield batch
        return
    length = max(stage.mask.shape[1] for stage in batch.stages.values())
    for start in range(0, length, num_actions):
        window = {}
        for name, stage in batch.stages.items():
            inside = torch.zeros_like(stage.mask)
            inside[:, start : start + num_actions] = True
            window[name] = evolve(stage, mask=stage.mask & inside)
        if any(stage.mask.any() for stage in window.values()):
            yield evolve(batch, stages=window)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Returns (N, T, ...) with the (K, ...) values where the mask is True, else 0."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    out[mask] = values
    return out


def join_stages(batch: Batch, claim: Claim) -> Stage:
    """Returns the claim's stages of a batch as one, joined along T; one stage is itself."""
    parts = [batch.stages[name] for name in claim if name in batch.stages]
    if len(parts) == 1:
        return parts[0]
    log_probs = [part.log_probs for part in parts]
    # A stage that is replayed as it was drawn was drawn from its log-probs.
    behaviour = [part.log_probs if part.behaviour is None else part.behaviour for part in parts]
    apart = any(part.behaviour is not None for part in parts) and not any(x is None for x in behaviour)
    # Each row speaks with its last stage: a plan without an image still has its advantage.
    last = [
        max((k for k, p in enumerate(parts) if p.present[row].any()), default=0) for row in range(len(parts[0].keys))
    ]
    return evolve(
        parts[-1],
        name="+".join(claim),
        keys=tuple(parts[k].keys[row] for row, k in enumerate(last)),
        advantages=torch.stack([parts[k].advantages[row] for row, k in enumerate(last)]),
        groups=torch.stack([parts[k].groups[row] for row, k in enumerate(last)]),
        actions=torch.cat([p.actions for p in parts], 1)
        if len({p.actions.ndim for p in parts}) == 1
        else parts[-1].actions,
        present=torch.cat([p.present for p in parts], 1),
        mask=torch.cat([p.mask for p in parts], 1),
        log_probs=None if any(x is None for x in log_probs) else torch.cat(log_probs, 1),  # type: ignore[arg-type]
        context={f"{p.name}.{k}": v for p in parts for k, v in p.context.items()},
        behaviour=torch.cat(behaviour, 1) if apart else None,  # type: ignore[arg-type]
    )


def join_replays(replays: Mapping[str, Replay], claim: Claim) -> Replay:
    """Returns the claim's replays as one, joined along T; one replay is itself."""
    parts = [replays[name] for name in claim if name in replays]
    if len(parts) == 1:
        return parts[0]
    names = set.intersection(*(set(part.extras) for part in parts))
    return Replay(
        log_probs=_join([part.log_probs for part in parts]),
        entropy=_join([part.entropy for part in parts]),
        extras={name: torch.cat([part.extras[name] for part in parts], 1) for name in sorted(names)},
    )


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    whole = [part for part in parts if part is not None]
    return torch.cat(whole, 1) if len(whole) == len(parts) else None
