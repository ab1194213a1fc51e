"""Journal: what a run writes down while it goes: metrics, samples, evaluations. Lines only ever append."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from reasonrl.batch import Row
from reasonrl.errors import CheckpointError
from reasonrl.types import Score, Stop, Trajectory, Verdict

MOST_REASONS = 12
"""Reasons of silence that a step's metrics name; what is rarer counts as "other"."""
LONGEST_REASON = 40


@frozen
class Journal:
    """The lines of one run directory."""

    directory: Path

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Appends one step to metrics.jsonl."""
        self._append("metrics.jsonl", [line])

    def samples(self, step: int, trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], stage: str) -> None:
        """Appends judged trajectories to samples.jsonl, with their reward at a stage, and pictures beside it."""
        lines = []
        for index, (trajectory, verdict) in enumerate(zip(trajectories, verdicts, strict=True)):
            name = f"samples/step-{step:06d}-{index:02d}.png"
            lines.append(
                {
                    "step": step,
                    "prompt_id": trajectory.prompt.id,
                    "prompt": trajectory.prompt.text,
                    "member": list(trajectory.member),
                    "reasoning": trajectory.reasoning,
                    "image": self._picture(trajectory, name),
                    "reward": verdict.total(stage),
                    "scores": {k: s.value for k, s in verdict.scores.items()},
                    "notes": {k: s.note for k, s in verdict.scores.items() if s.note},
                }
            )
        self._append("samples.jsonl", lines)

    def evaluation(self, step: int, records: Iterable[tuple[dict[str, Any], Trajectory]]) -> None:
        """Appends evaluated prompts to evaluations.jsonl, with their pictures."""
        lines = []
        for index, (record, trajectory) in enumerate(records):
            name = f"evaluations/step-{step:06d}/{record['split']}-{index:04d}.png"
            lines.append({"step": step, **record, "image": self._picture(trajectory, name)})
        self._append("evaluations.jsonl", lines)

    def rewind(self, step: int) -> None:
        """Drops lines of steps that are not finished, before a resumed run writes them again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._keep(name, lambda found: found < step)

    def rewind_evaluation(self, step: int) -> None:
        """Drops this step's evaluation and later ones, before it is written again."""
        self._keep("evaluations.jsonl", lambda found: found < step)

    def _keep(self, name: str, wanted: Callable[[int], bool]) -> None:
        path = self.directory / name
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if wanted(_step(line, default=sys.maxsize))]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, path)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        try:
            with (self.directory / name).open("a") as file:
                file.writelines(json.dumps(_jsonable(line), allow_nan=False) + "\n" for line in lines)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.directory / name}: {error.strerror or error}; checkpoints are untouched, --resume"
            ) from error

    def _picture(self, trajectory: Trajectory, name: str) -> str | None:
        if trajectory.image is None:
            return None
        path = self.directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trajectory.image.save(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error.strerror or error}; checkpoints are untouched"
            ) from error
        return name


@frozen
class Seen:
    """What a step's metrics need of one trajectory: little, so that ranks can gather it."""

    verdict: Verdict
    stop: Stop
    lengths: Mapping[str, int]
    """Actions by stage."""
    groups: Mapping[str, int]
    advantages: Mapping[str, float]

    @classmethod
    def of(cls, row: Row, verdict: Verdict) -> Seen:
        """Returns what is needed of a credited trajectory."""
        lengths = {stage: len(segment.actions) for stage, segment in row.trajectory.segments.items()}
        return cls(verdict, row.trajectory.stop, lengths, dict(row.groups), dict(row.advantages))


def summary(seen: Sequence[Seen], stages: Sequence[str], trained: Sequence[str]) -> dict[str, float | None]:
    """Returns the rollout's metrics: rewards, scores, unscored and why, costs, lengths, silent groups."""
    verdicts = [s.verdict for s in seen]
    totals = {stage: [v.total(stage) for v in verdicts] for stage in trained}
    out: dict[str, float | None] = {"reward": _mean(totals[trained[-1]])}
    if len({tuple(values) for values in totals.values()}) > 1:
        out |= {f"reward/{stage}": _mean(values) for stage, values in totals.items()}
    names = dict.fromkeys(name for v in verdicts for name in v.scores)
    out |= {f"score/{n}": _mean([v.scores[n].value for v in verdicts if n in v.scores]) for n in names}
    out["unscored"] = _mean([float(any(totals[s][i] is None for s in trained)) for i in range(len(verdicts))])
    out |= {f"unscored/{why}": times / len(verdicts) for why, times in reasons(verdicts).items()}
    out |= {f"cost/{name}/{what}": amount for (name, what), amount in costs(verdicts).items()}
    out["cut"] = _mean([float(s.stop is Stop.LENGTH) for s in seen])
    for stage in stages:
        out[f"{stage}/tokens"] = _mean([float(s.lengths[stage]) for s in seen if stage in s.lengths])
        out[f"{stage}/flat_groups"] = _flat(seen, stage)
    return out


def reason(score: Score) -> str:
    """Returns why a score is None: its note up to the first colon."""
    said = " ".join(score.note.partition(":")[0].split())
    return said[:LONGEST_REASON] or "no reason given"


def reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Returns how many trajectories had a score that is None, by reason, the most frequent first."""
    silent = Counter(
        why for v in verdicts for why in {reason(score) for score in v.scores.values() if score.value is None}
    )
    named = dict(silent.most_common(MOST_REASONS))
    other = sum(silent.values()) - sum(named.values())
    return {**named, "other": named.get("other", 0) + other} if other else named


def costs(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], float]:
    """Returns what was spent in all, by the name of the score and what it is: calls, tokens, seconds, hits."""
    out: dict[tuple[str, str], float] = {}
    for verdict in verdicts:
        for name, score in verdict.scores.items():
            for what, amount in score.cost.items():
                out[name, what] = out.get((name, what), 0.0) + amount
    return out


def _flat(seen: Sequence[Seen], stage: str) -> float | None:
    groups: dict[int, bool] = {}
    for one in seen:
        if stage in one.groups:
            group = one.groups[stage]
            groups[group] = groups.get(group, True) and one.advantages[stage] == 0
    return _mean([float(flat) for flat in groups.values()])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _step(line: str, *, default: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return default  # a line that a crash cut short


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
