"""The denoising table: seconds, memory and kept activations of one RL step, and how far gradients are apart."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from attrs import asdict, evolve, frozen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from torch import Tensor, nn

from reasonrl.bench.denoisers import CONTENDERS, OURS, STRAIGHT, WHOLE, Job, Step
from reasonrl.bench.measure import Stopwatch, apart, machine, peak_bytes
from reasonrl.bench.sd3 import PIXELS, Model, build
from reasonrl.bench.step import relative
from reasonrl.errors import ConfigError

PHASES = ("sample", "forward", "backward", "optimizer")
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2}
"""Largest relative difference of a parameter's gradient that the same step may have."""
COMPARED = {"group": 2, "steps": 4, "trained": 3}
"""Of a job whose gradients are compared, at most."""
OPEN = 0.2
"""Its clip range: beyond all rounding, which in bfloat16 is more than 1e-4 and would clip at random."""


class Kept:
    """Bytes that autograd keeps for backward: each storage once, those of a module's weights not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.now = self.most = 0
        self._weights = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
        self._holders: Counter[int] = Counter()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Counts what is computed inside, until backward lets it go."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, _shown):
            yield

    def _keep(self, value: Tensor) -> _Held:
        held, storage = _Held(value), value.untyped_storage()
        place = storage.data_ptr()
        if place not in self._weights:
            self._holders[place] += 1
            if self._holders[place] == 1:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            weakref.finalize(held, self._let_go, place, storage.nbytes())
        return held

    def _let_go(self, place: int, num_bytes: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self.now -= num_bytes


class _Held:
    """A tensor that autograd keeps; it is let go with the graph's node."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _shown(held: _Held) -> Tensor:
    return held.value


@frozen
class Taken:
    """One RL step of one contender."""

    seconds: dict[str, float]
    """By phase: sample, forward, backward, optimizer."""
    peak: int | None
    """Bytes beyond the weights: with what was drawn, gradients and the optimizer's state."""
    kept: int | None
    """Bytes of activations that autograd keeps at once; None under checkpointing, which keeps layers' inputs itself."""
    log_ratio: float
    """Mean of |ln ρ| before the update."""


@frozen
class Measured:
    """A contender's medians over rounds."""

    contender: str
    seconds: float | None
    """All phases."""
    phases: dict[str, float]
    peak: int | None
    kept: int | None
    log_ratio: float | None
    failed: str = ""


def run(model: Model, *, dtype: str, job: Job, device: torch.device, repeats: int, only: str = "") -> dict[str, Any]:
    """Compares gradients, then measures the contenders whose names begin so, in turn, `repeats` rounds."""
    names = [name for name in CONTENDERS if name.startswith(only)]
    if not names:
        raise ConfigError(f"no contender begins with {only!r}: there are {'; '.join(CONTENDERS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[str, list[Taken]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("gradients", total=len(names) * repeats)
        gaps = {
            each: apart(partial(gradient_gap, model, each, job, device), device)
            for each in dict.fromkeys(("float32", dtype))
        }
        for name in names * repeats:
            progress.update(bar, description=f"{model.name}: {name}")
            if name not in failed:
                taken = apart(partial(take, model, name, dtype, job, device), device)
                if isinstance(taken, str):
                    failed[name] = taken
                else:
                    found[name].append(taken)
            progress.advance(bar)
    rows = [_measured(name, taken, failed.get(name, "")) for name, taken in found.items()]
    return {
        "machine": machine(device),
        "model": asdict(model),
        "dtype": dtype,
        "job": asdict(job),
        "repeats": repeats,
        "gradients": {each: {"difference": gap, "tolerance": TOLERANCES[each]} for each, gap in gaps.items()},
        "rows": [asdict(row) for row in rows],
    }


def take(model: Model, name: str, dtype: str, job: Job, device: torch.device) -> Taken:
    """Takes a step from new weights, after one on which libraries load and kept activations are counted."""
    family = build(model, dtype=dtype, learns=job.learns, device=device)
    parameters = [value for value in family.denoiser.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, foreach=True)
    step = partial(_step, CONTENDERS[name](family, job, dtype), optimizer, parameters)
    kept = Kept(family.denoiser)
    with kept():
        step(Stopwatch(device))
    watch = Stopwatch(device)
    gaps: list[float] = []
    peak = peak_bytes(lambda: gaps.append(step(watch)), device)
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    return Taken(
        watch.seconds,
        None if peak is None else peak + sum(value.nbytes for value in state),
        None if job.recomputes else kept.most,
        gaps[0],
    )


def _step(contender: Step, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], watch: Stopwatch) -> float:
    gap = contender(watch)
    with watch("optimizer"):
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return gap


def gradient_gap(model: Model, dtype: str, job: Job, device: torch.device) -> float:
    """Returns the largest of ‖ours − straight‖ / ‖straight‖ over parameters and both ways of ours, of a short job."""
    short = evolve(job, clip=OPEN, **{name: min(getattr(job, name), most) for name, most in COMPARED.items()})
    expected = gradients(STRAIGHT, model, dtype, short, device)
    gaps = []
    for name in (OURS, WHOLE):
        found = gradients(name, model, dtype, short, device)
        assert set(found) == set(expected), f"one side alone has gradients of {sorted(set(found) ^ set(expected))[:3]}"
        gaps += [relative(found[each], expected[each]) for each in expected]
    return max(gaps)


def gradients(name: str, model: Model, dtype: str, job: Job, device: torch.device) -> dict[str, Tensor]:
    """Returns a contender's gradients by parameter."""
    family = build(model, dtype=dtype, learns=job.learns, device=device)
    CONTENDERS[name](family, job, dtype)(Stopwatch(device))
    return {each: p.grad for each, p in family.denoiser.named_parameters() if p.grad is not None}


def _measured(name: str, taken: list[Taken], failed: str) -> Measured:
    if failed or not taken:
        return Measured(name, None, {}, None, None, None, failed)
    phases = {phase: median(one.seconds[phase] for one in taken) for phase in PHASES}
    peaks = [one.peak for one in taken if one.peak is not None]
    whole = median(sum(one.seconds.values()) for one in taken)
    return Measured(name, whole, phases, max(peaks, default=None), taken[0].kept, taken[0].log_ratio)


def rendered(result: dict[str, Any]) -> Iterator[RichTable]:
    """Yields the table; ratios are to ours."""
    job, model = result["job"], result["model"]
    learns = f"LoRA {job['rank']}" if job["rank"] else "full"
    again = "checkpointing" if job["recomputes"] else "no checkpointing"
    what = f"{job['group']} pictures of {model['side'] * PIXELS} px, {job['steps']} steps, {job['trained']} trained"
    title = f"{model['name']}, {result['dtype']}, {learns}, {again}: {what}, guidance {job['guidance']:g}"
    table = RichTable(title=title, box=None, title_justify="left")
    table.add_column("contender", no_wrap=True)
    headings = ("s", "× ours", "memory MB", "× ours", "kept MB", "× ours", *(f"{phase} s" for phase in PHASES))
    for name in (*headings, "|ln ρ|"):
        table.add_column(name, justify="right", no_wrap=True)
    ours: dict[str, Any] = next((row for row in result["rows"] if row["contender"] == OURS), {})
    for row in result["rows"]:
        table.add_row(row["contender"], *([row["failed"]] if row["failed"] else _cells(row, ours)))
    yield table


def _cells(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    def ratio(name: str) -> str:
        return f"{row[name] / ours[name]:.2f}" if row[name] and ours.get(name) else ""

    def megabytes(name: str) -> str:
        return "not measured" if row[name] is None else f"{row[name] / 1e6:,.0f}"

    return [
        f"{row['seconds']:.3g}",
        ratio("seconds"),
        megabytes("peak"),
        ratio("peak"),
        megabytes("kept"),
        ratio("kept"),
        *(f"{row['phases'][phase]:.3g}" for phase in PHASES),
        f"{row['log_ratio']:.1e}",
    ]


def said_of(result: dict[str, Any]) -> str:
    """Returns the lines under the table: whether gradients agree, and where it was measured."""
    here, versions = result["machine"], result["machine"]["versions"]
    where = f"{here['device']}, {here['threads']} threads, torch {versions['torch']}, {here['date']}"
    return "\n".join([*(_said_of_gradients(*each) for each in result["gradients"].items()), where])


def _said_of_gradients(dtype: str, found: dict[str, Any]) -> str:
    gap, most = found["difference"], found["tolerance"]
    if isinstance(gap, str):
        return f"gradients in {dtype} were not compared: {gap}"
    equal = "equal" if gap <= most else "DIFFERENT"
    return (
        f"gradients of {OURS}, streamed and not, and of the {STRAIGHT}, {dtype}: {equal}, largest relative difference"
        f" {gap:.1e} (limit {most:g})"
    )
