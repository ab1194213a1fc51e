"""Spent: what a run's judging cost and why it stayed silent, read from its metrics, as a section of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLUMNS = {
    "calls": "calls",
    "tokens_in": "tokens in",
    "tokens_out": "tokens out",
    "seconds": "seconds of asking",
    "retries": "retries",
    "hits": "cache hits",
}
"""What a cost is counted in, and what a reader calls it; other names stand as they are."""


def spent(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the run's totals, by score and then by what was spent."""
    out: dict[str, dict[str, float]] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("cost/") and _is_number(value):
                name, _, what = key.removeprefix("cost/").rpartition("/")
                row = out.setdefault(name, {})
                row[what] = row.get(what, 0.0) + value
    return out


def hidden(metrics: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Returns the seconds of judging in all and the fraction that sampling hid; None where nothing was timed."""
    timed = [
        (float(line["judge_s"]), float(line["judge_hidden_frac"]))
        for line in metrics
        if _is_number(line.get("judge_s")) and _is_number(line.get("judge_hidden_frac"))
    ]
    total = sum(seconds for seconds, _ in timed)
    return (total, sum(seconds * share for seconds, share in timed) / total) if total > 0 else None


def spent_evaluating(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns what all evaluations together took, of all scores."""
    out: dict[str, float] = {}
    for line in evaluations:
        for cost in (line.get("costs") or {}).values():
            for what, value in cost.items():
                out[what] = out.get(what, 0.0) + (value if _is_number(value) else 0.0)
    return out


def section(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns the HTML of the section, empty where judging cost nothing worth a table and nobody was silent."""
    parts = [_time(metrics), _costs(metrics, spent_evaluating(evaluations)), _silence(metrics)]
    found = "".join(parts[1:])
    return f"<h2>Judging</h2>{parts[0]}{found}" if found else ""


def _time(metrics: Sequence[Mapping[str, Any]]) -> str:
    found = hidden(metrics)
    if found is None:
        return ""
    return f"<p>{found[0]:,.1f} s of judging, {found[1]:.0%} of it hidden behind sampling.</p>"


def _costs(metrics: Sequence[Mapping[str, Any]], evaluating: Mapping[str, float]) -> str:
    rows = spent(metrics)
    every = [*rows.values(), evaluating]
    whats = [what for what in COLUMNS if any(what in row for row in every)]
    whats += sorted({what for row in every for what in row} - set(whats))
    if not whats:
        return ""
    lines = [("", name, row) for name, row in rows.items()]
    if len(rows) > 1:
        lines.append(("all", "all", {what: sum(row.get(what, 0.0) for row in rows.values()) for what in whats}))
    head = "".join(f"<th>{escape(COLUMNS.get(what, what))}</th>" for what in whats)
    body = "".join(
        f"<tr class='{kind}'><td>{escape(name)}</td>"
        + "".join(f"<td>{_amount(row.get(what), len(metrics))}</td>" for what in whats)
        + "</tr>"
        for kind, name, row in lines
    )
    if evaluating:
        body += "<tr><td>evaluations</td>" + "".join(f"<td>{_plain(evaluating.get(what))}</td>" for what in whats)
        body += "</tr>"
    return f"<table><tr><th>score</th>{head}</tr>{body}</table><p>In all steps, and <small>in one</small>.</p>"


def _amount(value: float | None, num_steps: int) -> str:
    if value is None:
        return _plain(value)
    return f"{_short(value)} <small>{_short(value / num_steps)}</small>"


def _plain(value: float | None) -> str:
    return "–" if value is None else _short(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _silence(metrics: Sequence[Mapping[str, Any]]) -> str:
    shares: dict[str, float] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("unscored/") and _is_number(value):
                why = key.removeprefix("unscored/")
                shares[why] = shares.get(why, 0.0) + value / len(metrics)
    rows = "".join(
        f"<tr><td>{escape(why)}</td><td>{share:.2%}</td></tr>"
        for why, share in sorted(shares.items(), key=lambda item: -item[1])
    )
    if not rows:
        return ""
    head = "<tr><th>why a score is missing</th><th>of the trajectories</th></tr>"
    return f"<table>{head}{rows}</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
