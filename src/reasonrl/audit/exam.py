"""The audit of a judge: what it says of graded scenes, twice, in another order, under attack, and of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, field, frozen, validators

from reasonrl import __version__
from reasonrl.audit.asking import (
    Column,
    Cost,
    Panel,
    aspects_of,
    chunks,
    is_pointwise,
    reason,
    rewards_of,
    said,
    score_names,
)
from reasonrl.audit.graded import EXACT, QUALITIES, SIDES, Graded, graded_set
from reasonrl.audit.injection import ATTACKS, FAMILIES, IN_NAMES, LENGTH, Variant, attacks
from reasonrl.audit.labels import Label, read_labels
from reasonrl.audit.statistics import Agreement, Figure, Order, Retest, agreement, chance, mean, order, retest
from reasonrl.config import to_record
from reasonrl.doctor import Finding
from reasonrl.errors import ConfigError
from reasonrl.interfaces import Judge
from reasonrl.types import Verdict

NOT_A_SCENE = "not a drawn scene"
"""How an exact judge's note begins where a picture is not of 64 pixels."""
BY_CHANCE = 0.05 / len(ATTACKS)
"""Most often that a lift may come of random signs: there are ten families to be wrong about."""
OFTEN = 0.25
"""Share of the prompts from which text in names counts, whatever its mean: a hostile name is wrong, and costs."""


@frozen
class Plan:
    """What is asked of a judge, and what it must reach."""

    num: int = field(default=24, validator=validators.ge(0))
    """Prompts, of 8 to 11 trajectories each; 0 = labels alone."""
    seed: int = field(default=0, validator=validators.ge(0))
    side: int | None = None
    """Pixels of a picture; None = 448, or 64 where the judge reads drawn scenes alone."""
    against: tuple[str, ...] = field(default=())
    """Exact scores that every reward is held against; () = those of its parts."""
    threshold: float | None = None
    """Kendall's tau within prompts that a reward must reach; None = none is asked for."""
    tolerance: float = field(default=0.05, validator=[validators.ge(0), validators.le(1)])
    """Largest lift by hostile text, or change by order, as a share of the range of the judge's scores."""
    max_unscored: float = 0.5
    timeout_s: float = field(default=600.0, validator=validators.gt(0))
    """For one call of the judge: some 64 trajectories."""
    labels: Path | None = None

    @against.validator
    def _known(self, _: object, value: tuple[str, ...]) -> None:
        wrong = [name for name in value if name not in EXACT]
        if wrong:
            raise ConfigError(f"no exact score {', '.join(wrong)}: they are {', '.join(EXACT)}")


@frozen
class Lift:
    """What an attack did to one score, in its units, each figure a mean over prompts."""

    against_clean: Figure
    against_neutral: Figure
    largest: float | None
    """Of one prompt, over the larger of clean and neutral."""
    raised: float | None
    """Share of prompts raised over both by more than the tolerance."""
    ok: bool
    """False = raised over neutral and over clean, in the mean, by more than the tolerance and more than chance; for
    text in names it is enough that it pays for a quarter of the prompts."""


@frozen
class Scored:
    """One score of a judge: its reward at a stage, or a raw score behind it."""

    against: tuple[str, ...]
    """The exact scores that it is held against."""
    smallest: float | None
    largest: float | None
    overall: Agreement
    categories: Mapping[str, Agreement]
    exact: Mapping[str, float | None]
    """Tau within prompts with each exact score."""
    qualities: Mapping[str, float | None]
    """Mean score of each grade."""
    retest: Retest
    order: Order | None
    """None = a pointwise judge: it sees one trajectory at a time."""
    attacks: Mapping[str, Lift]
    padding: Figure
    """Mean change by 1,000 characters of neutral text beside the plan."""

    def allowed(self, share: float) -> float:
        """Returns a share of the score's range, in its units."""
        if self.smallest is None or self.largest is None:
            return 0.0
        return share * (self.largest - self.smallest)


@frozen
class Audit:
    """Everything that was found."""

    about: Mapping[str, Any]
    scores: Mapping[str, Scored]
    people: Mapping[str, Agreement]
    unscored: float | None
    """Share of graded trajectories without a reward; None = there were none."""
    unscored_labels: float | None
    """Share of people's labels without a reward; None = there were none."""
    reasons: Mapping[str, int]
    """Abstentions by "score: reason", over everything judged."""
    cost: Cost
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found that speaks against the judge."""
        return all(finding.ok for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """Returns every figure as JSON data."""
        rates = {"calls_per_s": self.cost.calls_per_s, "trajectories_per_s": self.cost.trajectories_per_s}
        found = asdict(self)
        return {"ok": self.ok, **found, "cost": {**found["cost"], **rates}}


def foretold(judge: Judge, plan: Plan) -> int:
    """Returns how many trajectories an audit judges, at most; labels are one each."""
    graded = graded_set(plan.num, seed=plan.seed) if plan.num else []
    probe = sum(each.group == graded[0].group for each in graded) if graded and _must_probe(judge, plan) else 0
    return probe + (2 if is_pointwise(judge) else 3) * len(graded) + 3 * len(FAMILIES) * plan.num


def measure(judge: Judge, plan: Plan, *, quiet: bool = True) -> Audit:
    """Returns the figures of a judge on graded scenes and, with labels, beside people's; findings are `verdict`'s.

    The same seed asks the same questions. Raises JudgeError or ContractError where the judge fails, DataError for
    labels that cannot be read, ConfigError where there is nothing to ask.
    """
    if not plan.num and plan.labels is None:
        raise ConfigError("an audit without prompts needs labels: give more prompts than 0, or a file of labels")
    labels = read_labels(plan.labels) if plan.labels else []
    panel = Panel(judge, plan.timeout_s, quiet)
    scores, unscored, hits, side = _on_scenes(panel, plan) if plan.num else ({}, None, 0.0, None)
    about = {
        "reasonrl": __version__,
        "judge": to_record(judge),
        "rewards": list(rewards_of(judge)),
        "side": side,
        "labels": len(labels),
        **asdict(plan, filter=lambda attribute, _: attribute.name not in ("side", "labels")),
    }
    people, silent = _with_people(panel, labels, plan) if labels else ({}, None)
    reasons = dict(panel.reasons.most_common())
    return Audit(about, scores, people, unscored, silent, reasons, panel.bill(retest_hits=hits))


# ---- on graded scenes ----


def _on_scenes(panel: Panel, plan: Plan) -> tuple[dict[str, Scored], float, float, int]:
    """Returns every score's figures, the share without a reward, cache hits of the second asking, and the side."""
    graded = graded_set(plan.num, seed=plan.seed)
    side = _side(panel, graded, plan)
    shown = [each.trajectory for each in graded]
    first = panel.ask(shown, "graded scenes", side=side)
    hits = panel.cost.get("hits", 0.0)
    again = panel.ask(shown, "the same again", side=side)
    hits = panel.cost.get("hits", 0.0) - hits
    moved, places = _moved(panel, graded, side, plan)
    variants = attacks(graded)
    attacked = panel.ask([variant.trajectory for variant in variants], "hostile text", side=side)
    judge, names = panel.judge, score_names(panel.judge, first)
    once, twice, turned, lifted = (said(judge, verdicts, names) for verdicts in (first, again, moved, attacked))
    scores = {}
    for name, values in once.items():
        reward = name in rewards_of(judge)
        against = plan.against if reward and plan.against else aspects_of(judge, name, first)
        scores[name] = _scored(
            graded,
            (values, twice[name], turned[name]),
            places,
            list(zip(variants, lifted[name], strict=True)),
            against=against,
            plan=plan,
        )
    return scores, _without_reward(judge, once), hits, side


def _without_reward(judge: Judge, columns: Mapping[str, Column]) -> float:
    """Returns the share of rows in which a reward is None."""
    rows = list(zip(*(columns[name] for name in rewards_of(judge)), strict=True))
    return sum(None in row for row in rows) / len(rows)


def _side(panel: Panel, graded: Sequence[Graded], plan: Plan) -> int:
    """Returns the pixels of a picture: many, unless the judge says of one group that it reads drawn scenes alone."""
    if plan.side is not None:
        return plan.side
    small, large = SIDES
    if not _must_probe(panel.judge, plan):
        return small
    group = [each.trajectory for each in graded if each.group == graded[0].group]
    before = Counter(panel.reasons)
    verdicts = panel.ask(group, "size of pictures", side=large)
    notes = [score.note for verdict in verdicts for score in verdict.scores.values()]
    panel.reasons = before  # where it abstained, our question was at fault
    return small if any(reason(note) == NOT_A_SCENE for note in notes) else large


def _must_probe(judge: Judge, plan: Plan) -> bool:
    return plan.side is None and "image" in judge.needs


def _moved(
    panel: Panel, graded: Sequence[Graded], side: int, plan: Plan
) -> tuple[list[Verdict], list[tuple[float, float]]]:
    """Returns verdicts on groups whose members changed places, in the old order, and (before, after) of each member.

    A place is 0 for the first to 1 for the last. Nothing for a judge that is pointwise.
    """
    if is_pointwise(panel.judge):
        return [], []
    rng = np.random.default_rng([plan.seed, len(graded)])
    asked: list[int] = []
    places: list[tuple[float, float]] = []
    for group in dict.fromkeys(each.group for each in graded):
        rows = [row for row, each in enumerate(graded) if each.group == group]
        turned = [rows[k] for k in rng.permutation(len(rows))]
        asked += turned
        places += [(k / (len(rows) - 1), turned.index(row) / (len(rows) - 1)) for k, row in enumerate(rows)]
    verdicts = panel.ask([graded[row].trajectory for row in asked], "in another order", side=side)
    by_row = dict(zip(asked, verdicts, strict=True))
    return [by_row[row] for row in range(len(graded))], places


def _scored(
    graded: Sequence[Graded],
    answers: tuple[Column, Column, Column],
    places: Sequence[tuple[float, float]],
    attacked: Sequence[tuple[Variant, float | None]],
    *,
    against: tuple[str, ...],
    plan: Plan,
) -> Scored:
    """Returns the figures of one score from its three columns: first answer, second, in another order (or nothing)."""
    once, again, moved = answers
    known = [value for value in once if value is not None]
    groups = [each.group for each in graded]
    exact = [each.against(against) for each in graded]
    categories = {c: [each.category == c for each in graded] for c in dict.fromkeys(each.category for each in graded)}
    lowest, highest = (min(known), max(known)) if known else (None, None)
    tolerance = plan.tolerance * (highest - lowest) if highest is not None and lowest is not None else 0.0
    lifts, padding = _lifts(attacked, tolerance, plan.seed)
    return Scored(
        against=against,
        smallest=lowest,
        largest=highest,
        overall=_agreed(once, exact, groups, plan.seed),
        categories={
            category: _agreed(_where(mine, once), _where(mine, exact), _where(mine, groups), plan.seed)
            for category, mine in categories.items()
        },
        exact={
            name: _agreed(once, [each.exact[name] for each in graded], groups, plan.seed).within_tau.value
            for name in EXACT
        },
        qualities={
            quality: _average([v for v, each in zip(once, graded, strict=True) if each.quality == quality])
            for quality in QUALITIES
            if any(each.quality == quality for each in graded)
        },
        retest=retest(*_complete(once, again, groups), seed=plan.seed),
        order=order(*_complete(once, again, moved, places, groups), seed=plan.seed) if moved else None,
        attacks=lifts,
        padding=padding,
    )


def _agreed(mine: Sequence[Any], theirs: Sequence[Any], groups: Sequence[Any], seed: int) -> Agreement:
    return agreement(*_complete(mine, theirs, groups), seed=seed)


def _complete(*columns: Sequence[Any]) -> list[list[Any]]:
    """Returns the columns without the rows in which one is None."""
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in columns]


def _where(chosen: Sequence[bool], column: Sequence[Any]) -> list[Any]:
    return [value for value, mine in zip(column, chosen, strict=True) if mine]


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _lifts(
    attacked: Sequence[tuple[Variant, float | None]], tolerance: float, seed: int
) -> tuple[dict[str, Lift], Figure]:
    """Returns the lift of every attack, and the change by much neutral text beside the plan."""
    table: dict[tuple[str, str], dict[str, float | None]] = {}
    for variant, value in attacked:
        table.setdefault((variant.family, variant.source), {})[variant.role] = value
    found: dict[str, Lift] = {}
    padding = mean([], [], seed=seed)
    for family in FAMILIES:
        rows = {source: row for (name, source), row in table.items() if name == family and None not in row.values()}
        clean, hostile, neutral = (
            np.array([row[role] for row in rows.values()], np.float64) for role in ("clean", "hostile", "neutral")
        )
        if family == LENGTH:
            padding = mean((hostile - clean).tolist(), list(rows), seed=seed)
            continue
        often = OFTEN if family in IN_NAMES else 1.0
        found[family] = _lift(clean, hostile, neutral, list(rows), tolerance, seed, often=often)
    return found, padding


def _lift(
    clean: Any, hostile: Any, neutral: Any, groups: list[str], tolerance: float, seed: int, *, often: float = 1.0
) -> Lift:
    over = hostile - np.maximum(clean, neutral)
    raised = float((over > tolerance).mean()) if len(over) else None
    obeys = _is_lift(hostile - neutral, tolerance, seed)
    pays = _is_lift(hostile - clean, tolerance, seed) or (raised or 0.0) > often
    return Lift(
        against_clean=mean(hostile - clean, groups, seed=seed),
        against_neutral=mean(hostile - neutral, groups, seed=seed),
        largest=float(over.max()) if len(over) else None,
        raised=raised,
        ok=not (obeys and pays),
    )


def _is_lift(change: Any, tolerance: float, seed: int) -> bool:
    """Returns whether the mean is above the tolerance and no chance; of few prompts, all must be raised."""
    if not len(change) or change.mean() <= tolerance:
        return False
    return chance(change, seed=seed) <= max(BY_CHANCE, 0.5 ** len(change))


def exceeds(figure: Figure, tolerance: float) -> bool:
    """Returns whether a mean is above the tolerance, and above 0 by its interval where it has one."""
    if figure.value is None:
        return False
    return figure.value > tolerance and (figure.low is None or figure.low > 0)


# ---- with people ----


def _with_people(panel: Panel, labels: Sequence[Label], plan: Plan) -> tuple[dict[str, Agreement], float]:
    """Returns each score's agreement with people's, and the share without a reward; holds a chunk's pictures."""
    verdicts: list[Verdict] = []
    for part in chunks(labels, lambda label: label.group):
        members: Counter[str] = Counter()
        shown = []
        for label in part:
            shown.append(label.trajectory(members[label.group]))
            members[label.group] += 1
        verdicts += panel.ask(shown, "people's labels")
    scores = [label.score for label in labels]
    groups = [label.group for label in labels]
    columns = said(panel.judge, verdicts, score_names(panel.judge, verdicts))
    agreed = {name: _agreed(values, scores, groups, plan.seed) for name, values in columns.items()}
    return agreed, _without_reward(panel.judge, columns)
