"""The step's table: seconds by phase and peak memory of one RL step, and how far peers' gradient is from ours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, evolve, frozen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from torch import Tensor, nn

from reasonrl.bench.measure import Stopwatch, apart, machine, peak_bytes
from reasonrl.bench.models import Size, build
from reasonrl.bench.steps import LEARNERS, OURS, OURS_CONDITIONAL, PEERS, Accumulates, Contender, Job, prepare, rollout
from reasonrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

TRAINING = ("forward", "backward", "optimizer")
TOLERANCE = 1e-4
"""Largest relative difference of a parameter's gradient that the same step may have in float32."""
COMPARED, WARM = 16, 4
"""Words and image tokens at most: where gradients are compared, and where libraries load."""


@frozen
class Taken:
    """One step of one contender."""

    seconds: dict[str, float]
    """By phase: forward, backward, optimizer; sample, where it was asked for."""
    peak: int | None
    """Bytes beyond the weights, of the training phases: with gradients and the optimizer's state."""


@frozen
class Measured:
    """A contender's medians over rounds."""

    contender: str
    seconds: float | None
    """Forward, backward and optimizer."""
    phases: dict[str, float]
    peak: int | None
    failed: str = ""


def run(
    size: Size,
    *,
    dtype: str,
    job: Job,
    device: torch.device,
    repeats: int,
    samples: bool = True,
    only: str = "",
) -> dict[str, Any]:
    """Measures the contenders whose names begin so, one after the other in each of `repeats` rounds."""
    names = [name for name in LEARNERS if name.startswith(only)]
    if not names:
        raise ConfigError(f"no contender begins with {only!r}: there are {'; '.join(LEARNERS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[str, list[Taken]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("gradients", total=len(names) * repeats)
        gap = apart(partial(gradient_gap, size, job, device), device)
        for name in names * repeats:
            progress.update(bar, description=f"{size.name}: {name}")
            if name not in failed:
                taken = apart(partial(take, size, name, dtype, job, device, samples=samples), device)
                if isinstance(taken, str):
                    failed[name] = taken
                else:
                    found[name].append(taken)
            progress.advance(bar)
    rows = [_measured(name, taken, failed.get(name, "")) for name, taken in found.items()]
    return {
        "machine": machine(device),
        "size": {**asdict(size), "parameters": size.parameters},
        "dtype": dtype,
        "job": asdict(job),
        "repeats": repeats,
        "gradients": {"difference": gap, "tolerance": TOLERANCE},
        "rows": [asdict(row) for row in rows],
    }


def take(size: Size, name: str, dtype: str, job: Job, device: torch.device, *, samples: bool) -> Taken:
    """Takes a step from new weights; a short one first, on which libraries load and the optimizer's state is made."""
    contender = LEARNERS[name]
    model = build(size, dtype=dtype, device=device)
    prepare(model, job)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, foreach=True)
    step = partial(_step, optimizer, parameters)
    step(_learning(contender, model, _short(job, WARM)), Stopwatch(device))
    watch = Stopwatch(device)
    peak = peak_bytes(partial(step, _learning(contender, model, job), watch), device)
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    if samples:
        watch.seconds["sample"] = timed_sample(contender, model, job, device)
    return Taken(watch.seconds, None if peak is None else peak + sum(value.nbytes for value in state))


def timed_sample(contender: Contender, model: JanusForConditionalGeneration, job: Job, device: torch.device) -> float:
    """Returns the seconds of drawing a group with the contender's sampler, adapters in place."""
    language = model.model.language_model
    recomputes = language.training
    language.eval()  # with gradient checkpointing transformers would drop the cache
    contender.samples(model, _short(job, WARM).task, Stopwatch(device))
    watch = Stopwatch(device)
    contender.samples(model, job.task, watch)
    language.train(recomputes)
    return sum(watch.seconds.values())


def gradient_gap(size: Size, job: Job, device: torch.device) -> float:
    """Returns the largest of ‖ours − peers‖ / ‖peers‖ over parameters: guided, float32, at most 16 words and tokens."""
    ours, peers = (_gradients(size, _short(job, COMPARED), LEARNERS[name], device) for name in (OURS, PEERS))
    assert set(ours) == set(peers), f"one side alone has gradients of {sorted(set(ours) ^ set(peers))[:3]}"
    return max(relative(ours[name], peers[name]) for name in ours)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns ‖found − expected‖ / ‖expected‖; 0 where both are 0."""
    apart_by, size = (found - expected).norm(), expected.norm()
    return float(apart_by / size) if apart_by > 0 else 0.0


def _gradients(size: Size, job: Job, contender: Contender, device: torch.device) -> dict[str, Tensor]:
    model = build(size, dtype="float32", device=device)
    prepare(model, job)
    _learning(contender, model, job)(Stopwatch(device))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _learning(contender: Contender, model: JanusForConditionalGeneration, job: Job) -> Accumulates:
    config = model.config
    data = rollout(job.task, vocab=config.text_config.vocab_size, image_vocab=config.vq_config.num_embeddings)
    return contender.accumulates(model, data, job)


def _short(job: Job, most: int) -> Job:
    task = job.task
    task = evolve(task, group=min(task.group, 4), text=min(task.text, most), image=min(task.image, most))
    return evolve(job, task=task)


def _step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], accumulate: Accumulates, watch: Stopwatch
) -> None:
    accumulate(watch)
    with watch("optimizer"):
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    optimizer.zero_grad()


def _measured(name: str, taken: list[Taken], failed: str) -> Measured:
    if failed or not taken:
        return Measured(name, None, {}, None, failed)
    phases = {phase: median(one.seconds[phase] for one in taken) for phase in taken[0].seconds}
    peaks = [one.peak for one in taken if one.peak is not None]
    whole = median(sum(one.seconds[phase] for phase in TRAINING) for one in taken)
    return Measured(name, whole, phases, max(peaks) if peaks else None)


def rendered(result: dict[str, Any]) -> Iterator[RichTable]:
    """Yields the table: ratios are to ours of the same log-probs, guided or conditional."""
    job, task = result["job"], result["job"]["task"]
    learns = f"LoRA {job['rank']}" if job["rank"] else "full"
    what = f"{task['group']} rows of {task['prefix']} + {task['text']} + {task['image']} tokens"
    kept = "checkpointing" if job["recomputes"] else "no checkpointing"
    title = f"{result['size']['name']}, {result['dtype']}, {learns}, {kept}: {what}, guidance {task['guidance']:g}"
    table = RichTable(title=title, box=None, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("s", "× ours", "memory MB", "× ours", *(f"{phase} s" for phase in (*TRAINING, "sample"))):
        table.add_column(name, justify="right", no_wrap=True)
    by_name = {row["contender"]: row for row in result["rows"]}
    for name, row in by_name.items():
        ours = by_name.get(OURS if LEARNERS[name].guided else OURS_CONDITIONAL, {})
        table.add_row(name, *([row["failed"]] if row["failed"] else _cells(row, ours)))
    yield table


def _cells(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    def ratio(name: str) -> str:
        return f"{row[name] / ours[name]:.2f}" if row[name] and ours.get(name) else ""

    memory = "not measured" if row["peak"] is None else f"{row['peak'] / 1e6:,.0f}"
    phases = [row["phases"].get(phase) for phase in (*TRAINING, "sample")]
    return [
        f"{row['seconds']:.3g}",
        ratio("seconds"),
        memory,
        ratio("peak"),
        *("" if took is None else f"{took:.3g}" for took in phases),
    ]


def said_of_gradients(result: dict[str, Any]) -> str:
    """Returns the line under the table."""
    gap, most = result["gradients"]["difference"], result["gradients"]["tolerance"]
    if isinstance(gap, str):
        return f"gradients of {OURS} and {PEERS} were not compared: {gap}"
    equal = "equal" if gap <= most else "DIFFERENT"
    return f"gradients of {OURS} and {PEERS}, float32: {equal}, largest relative difference {gap:.1e} (limit {most:g})"
