"""Asking a judge and reading what it said: its rewards, the scores behind them, and what each is about."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from attrs import Factory, define, frozen

from reasonrl.audit.graded import seen
from reasonrl.interfaces import Judge, PointwiseJudge
from reasonrl.interfaces.judge import Named, On, Product, Scaled, Sum
from reasonrl.judges.dual_stage import DualStage
from reasonrl.progress import Progress
from reasonrl.rollout import Guarded
from reasonrl.types import EVERY, Trajectory, Verdict

T = TypeVar("T")
Column = list[float | None]

CHUNK = 64
"""Trajectories judged at once, groups whole: enough for a server's queue."""
PLAN_ASPECTS = ("semantic", "spatial")
_ABOUT = {
    "promptimage": "prompt-image",
    "reasoningimage": "reasoning-image",
    "semantic": "semantic",
    "spatial": "spatial",
    "layout": "spatial",
    "geometry": "spatial",
}


@frozen
class Cost:
    """What an audit took."""

    judged: int
    """Trajectories, every time that one was judged."""
    seconds: float
    """Spent waiting for the judge."""
    cost: Mapping[str, float] = Factory(dict)
    """`Score.cost`, added up."""
    retest_hits: float = 0.0
    """Answers of the second asking that came from a cache."""

    @property
    def calls_per_s(self) -> float | None:
        """Calls a second; None where the judge counts no calls."""
        calls = self.cost.get("calls", 0.0)
        return calls / self.seconds if calls and self.seconds > 0 else None

    @property
    def trajectories_per_s(self) -> float | None:
        """Judged trajectories a second; None where there was nothing to time."""
        return self.judged / self.seconds if self.seconds > 0 else None


@define
class Panel:
    """A judge that is asked, and what that costs."""

    judge: Judge
    timeout_s: float
    quiet: bool = True
    judged: int = 0
    seconds: float = 0.0
    cost: dict[str, float] = Factory(dict)
    reasons: Counter[str] = Factory(Counter)
    """Abstentions by "score: reason"."""

    def ask(self, trajectories: Sequence[Trajectory], what: str, *, side: int | None = None) -> list[Verdict]:
        """Returns a verdict each, under a bar called `what`; JudgeError or ContractError where the judge fails.

        Pictures are enlarged to `side` pixels a part at a time: thousands of them need not fit in memory.
        """
        guarded = Guarded(self.judge, self.timeout_s)
        parts = chunks(trajectories, lambda trajectory: trajectory.prompt.id)
        found: list[Verdict] = []
        for drawn in Progress(1, quiet=self.quiet).watch(parts, what, total=len(parts)):
            part = drawn if side is None else [seen(trajectory, side) for trajectory in drawn]
            begun = time.perf_counter()
            found += guarded.judge(part)
            self.seconds += time.perf_counter() - begun
            self.judged += len(part)
        for verdict in found:
            for name, score in verdict.scores.items():
                for kind, amount in score.cost.items():
                    self.cost[kind] = self.cost.get(kind, 0.0) + amount
                if score.value is None:
                    self.reasons[f"{name}: {reason(score.note)}"] += 1
        return found

    def bill(self, *, retest_hits: float = 0.0) -> Cost:
        """Returns what was spent so far."""
        return Cost(self.judged, self.seconds, dict(self.cost), retest_hits)


def chunks(items: Sequence[T], group: Callable[[T], object]) -> list[list[T]]:
    """Returns the items in runs of whole groups, each of CHUNK or just more."""
    found: list[list[T]] = [[]]
    for before, item in zip([None, *items], items, strict=False):
        if len(found[-1]) >= CHUNK and before is not None and group(before) != group(item):
            found.append([])
        found[-1].append(item)
    return found


def reason(note: str) -> str:
    """Returns what a note begins with, up to its colon: abstentions are counted by it."""
    return note.partition(":")[0].strip() or "no reason given"


# ---- what it said ----


def rewards_of(judge: Judge) -> dict[str, str]:
    """Returns the stage of each reward by its name: "reward", and "reward on reasoning" where stages differ."""
    return {"reward" if stage == EVERY else f"reward on {stage}": stage for stage in sorted(judge.stages)}


def score_names(judge: Judge, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Returns the raw scores worth a column: those with a value somewhere, none where one alone is the reward."""
    valued = dict.fromkeys(
        name for verdict in verdicts for name, score in verdict.scores.items() if score.value is not None
    )
    names = tuple(name for name in valued if name not in rewards_of(judge))
    if len(names) == 1 and len(judge.stages) == 1:
        [stage] = judge.stages
        raw = [verdict.scores[names[0]].value if names[0] in verdict.scores else None for verdict in verdicts]
        return () if raw == [verdict.total(stage) for verdict in verdicts] else names
    return names


def said(judge: Judge, verdicts: Sequence[Verdict], names: Sequence[str]) -> dict[str, Column]:
    """Returns a column of values for each reward, then for each of these raw scores."""
    columns: dict[str, Column] = {
        name: [verdict.total(stage) for verdict in verdicts] for name, stage in rewards_of(judge).items()
    }
    raw = {name: [v.scores[name].value if name in v.scores else None for v in verdicts] for name in names}
    return columns | raw


# ---- what it is about ----


def aspects_of(judge: Judge, column: str, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Returns the exact scores that a column is held against.

    A raw score by its name (Semantic, Spatial, ReasoningImage, PromptImage), else by what its judge needs: prompt-image
    where that is an image, semantic and spatial where it is not. A reward: those of the scores that its terms name.
    """
    needs = needs_by_score(judge)
    scores = list(dict.fromkeys(name for verdict in verdicts for name in verdict.scores)) or list(needs)
    if column in rewards_of(judge):
        stage = rewards_of(judge)[column]
        spoken = {word for v in verdicts for term in v.on(stage) or () for word in re.split(r"[*+()]", term.name)}
        named = [name for name in scores if name in spoken or name.partition(".")[0] in spoken]
        found = {aspect for name in named or scores for aspect in _aspects(name, needs.get(name, judge.needs))}
    else:
        found = set(_aspects(column, needs.get(column, judge.needs)))
    return tuple(aspect for aspect in ("prompt-image", *PLAN_ASPECTS, "reasoning-image") if aspect in found)


def _aspects(name: str, needs: frozenset[str]) -> tuple[str, ...]:
    letters = "".join(filter(str.isalpha, name.rpartition(".")[2])).lower()
    about = next((aspect for word, aspect in _ABOUT.items() if word in letters), None)
    if about is not None:
        return (about,)
    return ("prompt-image",) if "image" in needs else PLAN_ASPECTS


def needs_by_score(judge: Judge) -> dict[str, frozenset[str]]:
    """Returns what is needed for each score, as far as the expression says."""
    if isinstance(judge, PointwiseJudge):
        return {judge.name: judge.needs}
    parts = list(_parts(judge))
    if not parts:
        return {type(judge).__name__: judge.needs}
    found = {name: needs for part in parts for name, needs in needs_by_score(part).items()}
    if isinstance(judge, Named):
        return {judge.name if len(found) == 1 else f"{judge.name}.{name}": needs for name, needs in found.items()}
    return found


def is_pointwise(judge: Judge) -> bool:
    """Returns whether it is known to look at one trajectory at a time."""
    parts = list(_parts(judge))
    return all(map(is_pointwise, parts)) if parts else isinstance(judge, PointwiseJudge)


def _parts(judge: Judge) -> Iterator[Judge]:
    """Yields the parts of an expression; of other judges it is not known what they do with theirs."""
    if isinstance(judge, Sum | Product):
        yield from judge.parts
    elif isinstance(judge, Scaled | On | Named):
        yield judge.part
    elif isinstance(judge, DualStage):
        yield judge.expression
