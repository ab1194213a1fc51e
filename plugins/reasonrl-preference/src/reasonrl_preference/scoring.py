"""From raw numbers to verdicts: batches, one item's failure, the map to [0, 1], what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import field
from PIL.Image import DecompressionBombError

from reasonrl import Score, Trajectory, Verdict
from reasonrl.registry import one_line

Measure = Callable[[Sequence[Trajectory]], list[float]]
"""One raw number for each of some trajectories, all with an image."""

FAULTS = (ArithmeticError, EOFError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, DecompressionBombError)
"""What a picture that cannot be read, a text that cannot be encoded, or a full device raises."""


def span(default: float) -> Any:
    """Returns the field `high`: above `low`, both finite."""

    def above(judge: Any, _: object, value: float) -> None:
        if not (math.isfinite(judge.low) and math.isfinite(value) and judge.low < value):
            raise ValueError(f"high must be above low, both finite, got low={judge.low} and high={value}")

    return field(default=default, validator=above)


def scored(
    name: str, trajectories: Sequence[Trajectory], measure: Measure, *, low: float, high: float, batch_size: int
) -> list[Verdict]:
    """Returns one verdict each: low..high mapped to [0, 1] and clamped, 0 without an image, None where it failed."""
    scores = [Score(0.0, "no image")] * len(trajectories)
    drawn = [k for k, trajectory in enumerate(trajectories) if trajectory.image is not None]
    for rows in (drawn[k : k + batch_size] for k in range(0, len(drawn), batch_size)):
        began = time.perf_counter()
        raws = _measured([trajectories[k] for k in rows], measure)
        cost = {"calls": 1.0, "seconds": (time.perf_counter() - began) / len(rows)}
        for k, raw in zip(rows, raws, strict=True):
            scores[k] = Score(*_mapped(raw, low, high), cost)
    return [Verdict.of(name, score) for score in scores]


def _measured(batch: Sequence[Trajectory], measure: Measure) -> list[float | str]:
    """Returns raw numbers, or why there is none; a batch that fails is taken again one by one."""
    try:
        return list(measure(batch))
    except FAULTS as error:
        if len(batch) == 1:
            return [f"failed: {one_line(error)[:200]}"]
        return [raw for item in batch for raw in _measured([item], measure)]


def _mapped(raw: float | str, low: float, high: float) -> tuple[float | None, str]:
    if isinstance(raw, str):
        return None, raw
    if not math.isfinite(raw):
        return None, f"not finite: {raw}"
    return min(1.0, max(0.0, (raw - low) / (high - low))), ""
