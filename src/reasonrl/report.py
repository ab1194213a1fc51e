"""Report: what a run directory says, and one self-contained page that shows it."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from reasonrl.curves import curve, whiskers
from reasonrl.errors import CheckpointError, DataError
from reasonrl.plan import Plan
from reasonrl.spent import section

NUM_PAIRS = 24
NUM_SAMPLES = 16
LINE_COLORS = ("#d81b60", "#1e88e5", "#004d40", "#8e24aa", "#e65100", "#33691e")


@frozen(eq=False)
class Run:
    """What was read; `notes` say what could not be."""

    directory: Path
    metrics: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    recipe: Mapping[str, Any]
    about: Mapping[str, Any]
    notes: tuple[str, ...]


@frozen
class Accuracy:
    """Exact accuracy of one split and category ("all" = the whole split) at one step."""

    step: int
    split: str
    category: str
    n: int
    unscored: int
    mean: float | None
    low: float | None
    high: float | None


def read_run(directory: str | Path) -> Run:
    """Returns a run's files; raises DataError where the folder is no run."""
    directory = Path(directory)
    if not (directory / "recipe.json").is_file():
        raise DataError(f"{directory} holds no run: give the folder that `reasonrl train` printed")
    notes: list[str] = []
    lines = {name: _lines(directory / f"{name}.jsonl", notes) for name in ("metrics", "samples", "evaluations")}
    return Run(
        directory,
        **lines,
        recipe=_json(directory / "recipe.json", notes),
        about=_json(directory / "run.json", notes),
        notes=tuple(notes),
    )


def bootstrap_interval(
    values: Sequence[float], *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean, resampling prompts; DataError for no values."""
    if not values:
        raise DataError("an interval needs at least one value, got none")
    table = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = table[rng.integers(0, len(table), (num_resamples, len(table)))].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def accuracy(evaluations: Iterable[Mapping[str, Any]]) -> list[Accuracy]:
    """Returns exact accuracy by step, split and category; unscored prompts are counted, never averaged."""
    groups: dict[tuple[int, str, str], list[bool | None]] = {}
    for line in evaluations:
        for category in dict.fromkeys(("all", str(line["category"]))):
            groups.setdefault((int(line["step"]), str(line["split"]), category), []).append(line["exact"])
    return [_accuracy(*key, values) for key, values in groups.items()]


def _accuracy(step: int, split: str, category: str, values: Sequence[bool | None]) -> Accuracy:
    known = [float(v) for v in values if v is not None]
    silent = len(values) - len(known)
    if not known:
        return Accuracy(step, split, category, 0, silent, None, None, None)
    return Accuracy(
        step,
        split,
        category,
        len(known),
        silent,
        sum(known) / len(known),
        *bootstrap_interval(known),
    )


def planned_boxes_over(image: Image.Image, plan: Plan | None, *, scale: int = 4) -> Image.Image:
    """Returns the picture enlarged by whole pixels, with the planned boxes and their names drawn over it."""
    width, height = image.width * scale, image.height * scale
    big = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(big), ImageFont.load_default(size=11)
    for index, item in enumerate(plan.objects if plan else ()):
        if item.box is None:
            continue
        color = LINE_COLORS[index % len(LINE_COLORS)]
        # A model may plan a box thinner than a pixel, or with its corners swapped.
        left, right = sorted((item.box.x0 * width / 1000, item.box.x1 * width / 1000 - 1))
        top, bottom = sorted((item.box.y0 * height / 1000, item.box.y1 * height / 1000 - 1))
        pen.rectangle((left, top, right, bottom), outline=color, width=2)
        _, _, text_width, text_height = pen.textbbox((0, 0), item.name[:24], font=font)
        x = min(max(left, 0), max(width - text_width - 4, 0))
        y = min(max(top - text_height - 3, 0), height - text_height - 3)
        pen.rectangle((x, y, x + text_width + 3, y + text_height + 3), fill=color)
        pen.text((x + 2, y + 1), item.name[:24], fill="white", font=font)
    return big


def write_report(directory: str | Path) -> Path:
    """Writes report.html beside the run's files, whole or not at all."""
    run = read_run(directory)
    path = run.directory / "report.html"
    partial = run.directory / ".report.html.partial"
    try:
        partial.write_text(page(run), encoding="utf-8", errors="replace")  # half a pair is no text
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def page(run: Run) -> str:
    """Returns the HTML page: no scripts, nothing fetched, every text escaped."""
    sections = [
        _header(run),
        _headline(run),
        _table(run),
        _curves(run),
        section(run.metrics, run.evaluations),
        _pairs(run),
        _samples(run),
        _notes(run),
    ]
    return _SHELL.replace("{title}", escape(run.directory.name)).replace("{body}", "\n".join(filter(None, sections)))


def _header(run: Run) -> str:
    facts = [f"<b>{escape(str(k))}</b> {escape(str(v))}" for k, v in run.about.items()]
    recipe = escape(json.dumps(run.recipe, indent=1, ensure_ascii=False))
    return (
        f"<h1>{escape(run.directory.name)}</h1><p class=facts>{' · '.join(facts)}</p>"
        f"<details><summary>recipe</summary><pre>{recipe}</pre></details>"
    )


def _headline(run: Run) -> str:
    rows = [row for row in accuracy(run.evaluations) if row.category == "all" and row.mean is not None]
    if not rows:
        return ""
    shown = ends({row.step for row in rows})
    series = [
        (split, [(r.step > 0, r.mean, r.low, r.high) for r in rows if r.split == split and r.step in shown])
        for split in dict.fromkeys(row.split for row in rows)
    ]
    title = f"Exact accuracy, {' and '.join(f'step {step}' for step in shown)}"
    legend = "Dots are means over prompts, lines 95% bootstrap intervals; hollow = before training."
    return f"<h2>{title}</h2>{whiskers(series)}<p>{legend}</p>"


def _table(run: Run) -> str:
    rows = accuracy(run.evaluations)
    if not rows:
        return ""
    shown = ends({row.step for row in rows})
    keys = dict.fromkeys((row.split, row.category) for row in rows)
    found = {(row.split, row.category, row.step): row for row in rows}
    head = "".join(f"<th>step {step}</th>" for step in shown)
    body = "".join(
        f"<tr class='{'all' if c == 'all' else ''}'><td>{escape(s)}</td><td>{escape(c)}</td>"
        + "".join(f"<td>{_cell(found.get((s, c, step)))}</td>" for step in shown)
        + "</tr>"
        for s, c in keys
    )
    return f"<table><tr><th>split</th><th>category</th>{head}</tr>{body}</table>"


def _cell(row: Accuracy | None) -> str:
    if row is None or row.mean is None or row.low is None or row.high is None:
        return "not measured"
    silent = f", {row.unscored} unscored" if row.unscored else ""
    return f"{row.mean:.1%} <small>[{row.low:.1%}, {row.high:.1%}] n={row.n}{silent}</small>"


def _curves(run: Run) -> str:
    names = [k for k in dict.fromkeys(k for line in run.metrics for k in line) if k != "step" and not _is_cost(k)]
    first = [k for k in names if k.startswith(("reward", "score/"))]
    order = first + [k for k in names if k not in first]
    steps = [float(line["step"]) for line in run.metrics]
    panels = [curve(name, steps, [_float(line.get(name)) for line in run.metrics]) for name in order]
    return f"<h2>Curves</h2><div class=grid>{''.join(panels)}</div>" if run.metrics else ""


def _is_cost(name: str) -> bool:
    return name.startswith("cost/")  # a table, not a panel each


def _pairs(run: Run) -> str:
    steps = ends({int(line["step"]) for line in run.evaluations})
    if not steps:
        return ""
    by_prompt: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in run.evaluations:
        by_prompt.setdefault((str(line["split"]), str(line["prompt_id"])), {})[int(line["step"])] = line
    chosen = _spread(list(by_prompt.values()), NUM_PAIRS)
    cards = "".join(
        f"<section><h3>{escape(str(next(iter(found.values()))['prompt']))}</h3><div class=pair>"
        + "".join(_card(run, found[step], f"step {step}") for step in ends(steps) if step in found)
        + "</div></section>"
        for found in chosen
    )
    return f"<h2>Before and after</h2><div class=pairs>{cards}</div>"


def _samples(run: Run) -> str:
    latest = max((int(line["step"]) for line in run.samples), default=None)
    lines = [line for line in run.samples if line["step"] == latest][:NUM_SAMPLES]
    cards = "".join(
        f"<section><h3>{escape(str(line['prompt']))}</h3>{_card(run, line, '')}</section>" for line in lines
    )
    return f"<h2>Training samples of step {latest}</h2><div class=pairs>{cards}</div>" if lines else ""


def _card(run: Run, line: Mapping[str, Any], label: str) -> str:
    plan = Plan.parse(str(line.get("reasoning") or ""))
    scores = {**(line.get("scores") or {})}
    if line.get("reward") is not None:
        scores = {"reward": line["reward"], **scores}
    marks = " ".join(f"<span>{escape(str(k))} {_score(v)}</span>" for k, v in scores.items())
    verdict = {True: " · exact", False: " · not exact", None: ""}[line.get("exact")]
    return (
        f"<figure>{_picture(run, line.get('image'), plan)}<figcaption>{escape(label)}{verdict}"
        f"<code>{escape(plan.text) or '(no plan)'}</code><small>{marks}</small></figcaption></figure>"
    )


def _picture(run: Run, name: Any, plan: Plan) -> str:
    image = _image(run.directory, name)
    if image is None:
        return "<div class=missing>no picture</div>"
    buffer = io.BytesIO()
    planned_boxes_over(image, plan, scale=max(1, 192 // max(image.size))).save(buffer, "PNG", optimize=True)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _image(directory: Path, name: Any) -> Image.Image | None:
    """Returns a PNG of the run itself; a path that leads outside is not followed."""
    if not isinstance(name, str) or not name.endswith(".png"):
        return None
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError):
        return None


def _notes(run: Run) -> str:
    reasons: dict[str, int] = {}
    for line in (*run.samples, *run.evaluations):
        for name, note in (line.get("notes") or {}).items():
            if (line.get("scores") or {}).get(name) is None:
                reasons[f"{name}: {note}"] = reasons.get(f"{name}: {note}", 0) + 1
    texts = [*run.notes, *(f"unscored, {times} times: {why}" for why, times in reasons.items())]
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _spread(items: Sequence[dict[int, dict[str, Any]]], number: int) -> list[dict[int, dict[str, Any]]]:
    """Returns a few of each split and category, in turns."""
    piles: dict[tuple[str, str], list[dict[int, dict[str, Any]]]] = {}
    for item in items:
        line = next(iter(item.values()))
        piles.setdefault((str(line["split"]), str(line["category"])), []).append(item)
    turns = [
        pile[i] for i in range(max(map(len, piles.values()), default=0)) for pile in piles.values() if i < len(pile)
    ]
    return turns[:number]


def ends(steps: Iterable[int]) -> list[int]:
    """Returns the first and the last step, or the only one."""
    ordered = sorted(steps)
    return ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]


def _score(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "unscored"


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _lines(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    out = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            out.append(line if isinstance(line, dict) and isinstance(line.get("step"), int) else None)
        except json.JSONDecodeError:
            out.append(None)
        if out[-1] is None:
            notes.append(f"{path.name} line {number} cannot be read: left out")
    return tuple(line for line in out if line is not None)


def _json(path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}


_SHELL = """<!doctype html><html lang=en><head><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width"><title>{title}</title><style>
:root{color-scheme:light dark;--ink:#1c1f24;--soft:#6b7280;--line:#d9dde3;--paper:#fff;--card:#f6f7f9;--a:#1e66d0;--b:#d0571e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3af;--line:#343a43;--paper:#14171b;--card:#1d2127;--a:#6aa8ff;--b:#ff9d6a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}h3{font-size:.92rem;margin:0 0 .4rem}
.facts,small,figcaption,summary{color:var(--soft);font-size:.82rem}pre,code{font:12px/1.45 ui-monospace,monospace}
pre{overflow:auto;background:var(--card);padding:.8rem;border-radius:6px}code{display:block;margin:.3rem 0;word-break:break-word;color:var(--ink)}
table{border-collapse:collapse}td,th{text-align:left;padding:.2rem 1rem .2rem 0;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
tr.all td{font-weight:600}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:.8rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:1rem}section{background:var(--card);padding:.8rem;border-radius:8px;break-inside:avoid}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}figure{margin:0}img{width:192px;height:192px;border-radius:4px;image-rendering:pixelated}
.missing{width:192px;height:192px;display:grid;place-items:center;border:1px dashed var(--line);color:var(--soft)}span{margin-right:.6em;white-space:nowrap}
svg text{fill:var(--soft);font:10px system-ui,sans-serif}svg .name{fill:var(--ink);font-size:11px}
</style></head><body>{body}</body></html>
"""
