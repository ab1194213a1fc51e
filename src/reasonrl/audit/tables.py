"""An audit as tables for a terminal, and as a file for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile

from rich.table import Table
from rich.text import Text

from reasonrl.audit.exam import Audit, Lift, Scored
from reasonrl.audit.graded import EXACT, QUALITIES
from reasonrl.audit.injection import ATTACKS
from reasonrl.audit.statistics import Agreement, Figure
from reasonrl.audit.verdict import formula, signed
from reasonrl.errors import CheckpointError
from reasonrl.folder import write_json

NOT_KNOWN = "-"
_FIGURES = ("tau within prompts", "tau-b within", "tau-b", "rho within", "rho")
WIDTH = 160
"""Columns of a terminal that the tables are laid out for; a narrower one wraps them."""


def rendered(audit: Audit) -> Iterator[Table]:
    """Yields the tables of an audit; 95% bootstrap intervals by prompt in brackets."""
    if audit.scores:
        yield _agreement("agreement with exact scores", {name: s.overall for name, s in audit.scores.items()}, audit)
        yield _categories(audit.scores)
        yield _exact(audit.scores)
        yield _qualities(audit.scores)
        yield _repeated(audit.scores)
        yield _attacks(audit.scores)
    if audit.people:
        yield _agreement("agreement with people", audit.people, audit)
    yield _spent(audit)


def write(audit: Audit, directory: Path) -> Path:
    """Writes audit.json, every figure, and returns its path; raises CheckpointError where it cannot."""
    path = directory / "audit.json"
    prepare(directory)
    write_json(path, audit.record())
    return path


def prepare(directory: Path) -> None:
    """Makes the folder of an audit; raises CheckpointError where nothing can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}; give another --out") from error


def _agreement(title: str, found: Mapping[str, Agreement], audit: Audit) -> Table:
    table = _table(title, "score", "against", "n", *_FIGURES, "groups", "pairs")
    for name, each in found.items():
        known = name in audit.scores and title != "agreement with people"
        table.add_row(
            Text(name),
            formula(audit.scores[name].against) if known else "people",
            str(each.n),
            str(each.within_tau),
            *(_number(f.value) for f in (each.within_kendall, each.kendall, each.within_spearman, each.spearman)),
            _share(each.tied_groups),
            _share(each.tied_pairs),
        )
    table.caption = "groups: all members tied; pairs: not told apart, of those within a prompt that should be"
    return table


def _categories(scores: Mapping[str, Scored]) -> Table:
    table = _table("tau within prompts, by category", "category", *scores)
    for category in next(iter(scores.values())).categories:
        table.add_row(category, *(str(s.categories[category].within_tau) for s in scores.values()))
    return table


def _exact(scores: Mapping[str, Scored]) -> Table:
    table = _table("tau within prompts with each exact score", "score", *EXACT)
    for name, found in scores.items():
        table.add_row(Text(name), *(_number(found.exact[exact]) for exact in EXACT))
    return table


def _qualities(scores: Mapping[str, Scored]) -> Table:
    table = _table("mean score by what is wrong", "grade", *scores, "")
    for quality, meaning in QUALITIES.items():
        values = [found.qualities.get(quality) for found in scores.values()]
        if any(value is not None for value in values):
            table.add_row(quality, *map(_number, values), meaning)
    return table


def _repeated(scores: Mapping[str, Scored]) -> Table:
    table = _table(
        "asked twice, and in another order",
        "score",
        "sd of an answer",
        "largest change",
        "order turned",
        "more by moving",
        "last to first",
    )
    for name, found in scores.items():
        twice, moved = found.retest, found.order
        places = (str(moved.excess), str(moved.to_front)) if moved else ("pointwise", "pointwise")
        table.add_row(Text(name), str(twice.sd), _number(twice.largest), str(twice.flips), *places)
    return table


def _attacks(scores: Mapping[str, Scored]) -> Table:
    table = _table("change by hostile text: over the clean plan / over as much neutral text", "attack", *scores)
    for family in ATTACKS:
        table.add_row(family, *(_lift(found.attacks[family]) for found in scores.values()))
    table.add_row("(1,000 characters that say nothing)", *(_signed(found.padding) for found in scores.values()))
    return table


def _lift(lift: Lift) -> str:
    mark = "" if lift.ok else "  FAIL"
    return f"{_signed(lift.against_clean)} / {_signed(lift.against_neutral)}{mark}"


def _spent(audit: Audit) -> Table:
    table = _table("what it took", "", "")
    cost = audit.cost
    table.add_row("judged trajectories", str(cost.judged))
    table.add_row("seconds waited", f"{cost.seconds:.1f}")
    table.add_row("trajectories a second", _number(cost.trajectories_per_s))
    table.add_row("calls a second", _number(cost.calls_per_s))
    for name, amount in cost.cost.items():
        table.add_row(Text(f"{name}, added up"), f"{amount:,.0f}" if amount == int(amount) else f"{amount:,.1f}")
    for why, times in audit.reasons.items():
        table.add_row(Text(f"abstained, {why}"), str(times))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None)
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.2f}"


def _signed(figure: Figure) -> str:
    return NOT_KNOWN if figure.value is None else signed(figure.value)
