"""The kernels' tables: time, rate, share of the ceiling, peak memory and error of every contender at every size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from attrs import asdict, evolve, frozen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from torch import Tensor

from reasonrl.bench.contenders import CONTENDERS, Contender
from reasonrl.bench.measure import Ceilings, apart, ceilings, machine, peak_bytes, seconds
from reasonrl.bench.problems import CFG_WEIGHT, Answer, Problem, Shape, Table, operands, solved
from reasonrl.bench.small import small_operators
from reasonrl.errors import ConfigError

OURS = "reasonrl"
TITLES = {
    "logits": "log-probs from logits",
    "linear": "log-probs from hidden states and a head",
    "guidance": f"guided log-probs, w = {CFG_WEIGHT:g}",
}
PHASES = {"forward": "forward", "both": "and backward", "frozen": "frozen head"}
WORK = {"forward": 2, "both": 8, "frozen": 6}
"""Products of N·V·H operations that each phase is counted with, for every contender: 8 = 2 forward, 2 again, 4 back."""
TRAFFIC = {"forward": 1, "both": 3}
"""Readings and writings of the logits: once forward, twice backward."""


@frozen
class Measured:
    """What one contender did at one size."""

    contender: str
    shape: Shape
    seconds: dict[str, float]
    """By phase: forward (without gradients), both, frozen (both, the head needs none)."""
    rate: dict[str, float]
    """Bytes a second for logits, operations a second otherwise; by phase."""
    share: dict[str, float]
    """Of the ceiling; by phase."""
    peak: int | None
    """Bytes beyond operands and gradients, forward and backward; None = not measured."""
    errors: dict[str, float]
    """Against float64: log_prob, the largest; rows and words, a gradient's norm relative to the answer's."""
    failed: str = ""


def run(
    tables: Sequence[Table],
    *,
    device: torch.device,
    rows: Sequence[int] = (),
    vocab: Sequence[int] = (),
    width: Sequence[int] = (),
    only: str = "",
    least_s: float = 1.0,
) -> dict[str, Any]:
    """Measures the contenders of some tables whose names begin so; empty sizes are the device's own. Shows progress."""
    sizes = shapes(tables, device=device, rows=rows, vocab=vocab, width=width)
    chosen = [contender for contender in CONTENDERS if contender.name.startswith(only)]
    jobs = [(shape, contender) for shape in sizes for contender in chosen if contender.table == shape.table]
    if not jobs:
        raise ConfigError(
            f"no contender begins with {only!r}: there are {', '.join(sorted({c.name for c in CONTENDERS}))}"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Measured] = []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("this machine's ceilings", total=len(jobs))
        limits = ceilings(device)
        answered: tuple[Shape, Tensor, Answer] | None = None
        for shape, contender in jobs:
            progress.update(task, description=f"{shape.label}: {contender.name}")
            missing = contender.missing(device.type)
            if missing:
                found.append(Measured(contender.name, shape, {}, {}, {}, None, {}, missing))
            else:
                if answered is None or answered[0] != shape:
                    answered = (shape, *solved(shape, operands(shape, device)))
                found.append(measured(shape, contender, answered[1], answered[2], limits, least_s=least_s))
            progress.advance(task)
    return {
        "machine": machine(device),
        "ceilings": asdict(limits),
        "rows": [asdict(row) for row in found],
        "small": small_operators(device, least_s=least_s) if device.type == "cuda" else [],
    }


def named(tables: str) -> list[Table]:
    """Returns the tables of "logits,linear"; raises ConfigError for one that is none."""
    known = {str(table): table for table in get_args(Table)}
    names = [name.strip() for name in tables.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"--tables takes {', '.join(known)} with commas between them, got {tables!r}")
    return [known[name] for name in names]


def shapes(
    tables: Sequence[Table], *, device: torch.device, rows: Sequence[int], vocab: Sequence[int], width: Sequence[int]
) -> list[Shape]:
    """Returns the sizes to measure; raises ConfigError for those that are none."""
    big = device.type == "cuda"
    rows = rows or ((8192, 32768, 65536) if big else (512,))
    vocab = vocab or (16384, 102400)
    width = width or ((2048, 4096) if big else (2048,))
    if min(*rows, *vocab, *width) < 1:
        raise ConfigError(f"sizes must be at least 1, got rows {rows}, vocab {vocab}, width {width}")
    return [
        Shape(table, n, v, h)
        for table in tables
        for h in ((0,) if table == "logits" else width)
        for v in vocab
        for n in rows
    ]


def measured(
    shape: Shape, contender: Contender, target: Tensor, answer: Answer, limits: Ceilings, *, least_s: float
) -> Measured:
    """Measures one contender; on a CPU in a process of its own, whose memory is its own. A failure is a result."""
    found = apart(partial(_measured, shape, contender.name, target, answer, limits, least_s), target.device)
    return Measured(contender.name, shape, {}, {}, {}, None, {}, found) if isinstance(found, str) else found


def _measured(shape: Shape, name: str, target: Tensor, answer: Answer, limits: Ceilings, least_s: float) -> Measured:
    contender = next(c for c in CONTENDERS if (c.table, c.name) == (shape.table, name))
    problem = evolve(operands(shape, target.device), target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer's, about itself
        _warm_up(contender, shape if contender.compiled else small(shape), target.device)
        peak = _peak(contender, problem)
        errors = _errors(contender, problem, answer)
        took = {phase: seconds(call, least_s=least_s) for phase, call in _phases(contender, problem)}
    elements = shape.rows * shape.vocab
    if shape.width:
        ceiling = limits.products["bfloat16"]
        rate = {phase: WORK[phase] * elements * shape.width / s for phase, s in took.items()}
    else:
        ceiling = limits.copy
        rate = {phase: TRAFFIC[phase] * 2 * elements / s for phase, s in took.items()}
    return Measured(name, shape, took, rate, {phase: r / ceiling for phase, r in rate.items()}, peak, errors)


def small(shape: Shape) -> Shape:
    """Returns the same question in small: libraries load on it, and no memory is kept."""
    return evolve(shape, rows=min(shape.rows, 32), vocab=min(shape.vocab, 512), width=min(shape.width, 64))


def _warm_up(contender: Contender, shape: Shape, device: torch.device) -> None:
    problem = operands(shape, device)
    for _, call in _phases(contender, problem):
        call()


def _phases(contender: Contender, problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields each way a contender is run."""

    def forward() -> object:
        with torch.no_grad():
            return contender.ask(problem)

    yield "forward", forward
    if contender.trains:
        yield "both", partial(_gradients, contender, problem, problem.operands)
        if problem.weight is not None:
            yield "frozen", partial(_gradients, contender, problem, problem.operands[:-1])


def _gradients(contender: Contender, problem: Problem, learning: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    for value in problem.operands:
        value.requires_grad_(any(value is one for one in learning))
    log_prob = contender.ask(problem)
    return log_prob.detach(), torch.autograd.grad(log_prob, learning, problem.slopes.to(log_prob.dtype))


def _peak(contender: Contender, problem: Problem) -> int | None:
    device = problem.target.device
    if not contender.trains:
        return peak_bytes(lambda: contender.ask(problem), device)
    found = peak_bytes(partial(_gradients, contender, problem, problem.operands), device)
    return None if found is None else max(0, found - sum(value.nbytes for value in problem.operands))


def _errors(contender: Contender, problem: Problem, answer: Answer) -> dict[str, float]:
    """Returns how far the answers are from float64's; targets are the same, and so are the operands."""
    if not contender.trains:
        found = contender.ask(problem)
        return {"log_prob": float((found.double() - answer.log_prob).abs().max())}
    found, gradients = _gradients(contender, problem, problem.operands)
    scale = 1.0 if problem.uncond is None else CFG_WEIGHT
    of_rows = gradients[0][answer.rows].double() / scale
    errors = {
        "log_prob": float((found.double() - answer.log_prob).abs().max()),
        "rows": float((of_rows - answer.of_rows).norm() / answer.of_rows.norm()),
    }
    if problem.weight is not None:
        of_words = gradients[-1][answer.words].double()
        errors["words"] = float((of_words - answer.of_words).norm() / answer.of_words.norm())
    return errors


def rendered(result: dict[str, Any]) -> Iterator[RichTable]:
    """Yields a table for each size, and one of the small operators."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(tuple(row["shape"].values()), []).append(row)
    for rows in groups.values():
        yield _rendered(rows)
    if result["small"]:
        table = RichTable("operator", "contender", "µs", "× ours", title="policy loss and advantages", box=None)
        for row in result["small"]:
            table.add_row(row["operator"], row["contender"], f"{row['seconds'] * 1e6:.0f}", f"{row['ratio']:.2f}")
        yield table


def _rendered(rows: list[dict[str, Any]]) -> RichTable:
    shape = Shape(**rows[0]["shape"])
    unit, size = ("TFLOP/s", 1e12) if shape.width else ("GB/s", 1e9)
    table = RichTable(title=f"{TITLES[shape.table]}: {shape.label}, bfloat16", box=None, title_justify="left")
    for name in ("contender", "phase"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "× ours", unit, "of peak", "memory MB", "log-prob error", "gradient error"):
        table.add_column(name, justify="right", no_wrap=True)
    ours: dict[str, float] = next((row["seconds"] for row in rows if row["contender"] == OURS), {})
    for row in rows:
        if row["failed"]:
            table.add_row(row["contender"], row["failed"])
        for phase, took in row["seconds"].items():
            first = phase == "forward"
            about = _about(row) if first else []
            ratio = f"{took / ours[phase]:.2f}" if phase in ours else ""
            rate, share = f"{row['rate'][phase] / size:.3g}", f"{row['share'][phase]:.0%}"
            table.add_row(
                row["contender"] if first else "", PHASES[phase], f"{took * 1e3:.3g}", ratio, rate, share, *about
            )
    return table


def _about(row: dict[str, Any]) -> list[str]:
    memory = "not measured" if row["peak"] is None else f"{row['peak'] / 1e6:,.0f}"
    gradients = [f"{error:.1e}" for name, error in row["errors"].items() if name != "log_prob"]
    return [memory, f"{row['errors']['log_prob']:.1e}", " ".join(gradients)]
