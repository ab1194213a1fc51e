"""The sampler's table: seconds, rates, phases, memory and share of the memory's bandwidth, beside peers' samplers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, evolve, frozen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from reasonrl.bench.measure import Stopwatch, apart, ceilings, machine, peak_bytes, read_rate
from reasonrl.bench.models import Size, build
from reasonrl.bench.samplers import OURS, SAMPLERS, Task, first_tokens
from reasonrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

WARM = 4
"""Tokens of the draw that libraries load on."""


@frozen
class Drawn:
    """One draw of one contender."""

    seconds: dict[str, float]
    """By phase; a contender's own phases, which add up to the whole."""
    peak: int | None
    """Bytes beyond the weights; None = not measured."""
    first: dict[str, float]
    """Ours alone, measured apart: "prepare" and "prefill", parts of the first phase."""
    step_bytes: int
    """What a step of an image must read: see `step_bytes`."""
    step_products: int
    """Operations of its matrix products with weights."""


@frozen
class Measured:
    """A contender at one dtype: medians over rounds."""

    contender: str
    dtype: str
    seconds: float | None
    phases: dict[str, float]
    """Seconds; ours without "prepare" and "prefill" in the phase that they begin."""
    step_s: float | None
    """Of one image token for the group: the image phase by its tokens. A prefill that is not a phase is in it."""
    bandwidth_frac: float | None
    """Of the read ceiling, at `step_bytes` a step; the same bytes for every contender, whatever it really reads."""
    products_frac: float | None
    """Of the ceiling of products in the dtype."""
    peak: int | None
    failed: str = ""


def run(
    size: Size,
    *,
    dtypes: Sequence[str],
    task: Task,
    device: torch.device,
    repeats: int,
    only: str = "",
) -> dict[str, Any]:
    """Measures the contenders whose names begin so, one after the other in each of `repeats` rounds."""
    names = [name for name in SAMPLERS if name.startswith(only)]
    if not names:
        raise ConfigError(f"no contender begins with {only!r}: there are {', '.join(SAMPLERS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[tuple[str, str], list[Drawn]] = {(dtype, name): [] for dtype in dtypes for name in names}
    failed: dict[tuple[str, str], str] = {}
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("this machine's ceilings", total=len(found) * repeats)
        limits, read = ceilings(device), read_rate(device)
        for dtype in dtypes:
            for name in names * repeats:
                progress.update(bar, description=f"{size.name}, {dtype}: {name}")
                if (dtype, name) not in failed:
                    drawn = apart(partial(draw, size, name, dtype, task, device), device)
                    if isinstance(drawn, str):
                        failed[dtype, name] = drawn
                    else:
                        found[dtype, name].append(drawn)
                progress.advance(bar)
    rows = [
        Measured(name, dtype, None, {}, None, None, None, None, failed[dtype, name])
        if (dtype, name) in failed
        else _measured(name, dtype, draws, task, read, limits.products[dtype])
        for (dtype, name), draws in found.items()
    ]
    return {
        "machine": machine(device),
        "size": {**asdict(size), "parameters": size.parameters},
        "task": asdict(task),
        "repeats": repeats,
        "ceilings": {**asdict(limits), "read": read},
        "rows": [asdict(row) for row in rows],
    }


def draw(size: Size, name: str, dtype: str, task: Task, device: torch.device) -> Drawn:
    """Draws once with new weights: no contender finds anything that another made ready."""
    model = build(size, dtype=dtype, device=device)
    short = evolve(task, text=min(task.text, WARM), image=min(task.image, WARM))
    SAMPLERS[name](model, short, Stopwatch(device))
    watch = Stopwatch(device)
    peak = peak_bytes(partial(SAMPLERS[name], model, task, watch), device)
    first = first_tokens(model, task, device) if name == OURS else {}
    return Drawn(watch.seconds, peak, first, step_bytes(model, task), step_products(model, task))


def step_bytes(model: JanusForConditionalGeneration, task: Task) -> int:
    """Returns the bytes that one image token of the whole group must read, at the middle of the image.

    Counted: the weights of the language model's layers and of the image's layers (head and aligner) once; keys and
    values of the prompt once for the group and once for the unconditional branch, whose blanked reasoning all rows
    share too; of what each row has written, once a row and branch. Keys and values in the weights' dtype.
    Not counted: activations, logits, embeddings, whatever is written.
    """
    config = model.config.text_config
    weights = sum(weight.nbytes for weight in _read(model))
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    shared = 2 * task.prefix + task.text
    own = task.group * (task.text + task.image - 1)  # half the image, in two branches
    return weights + position * (shared + own)


def step_products(model: JanusForConditionalGeneration, task: Task) -> int:
    """Returns the operations of one image token's products with weights: two rows a member, in every layer."""
    return 2 * 2 * task.group * sum(weight.numel() for weight in _read(model) if weight.ndim == 2)


def _read(model: JanusForConditionalGeneration) -> list[torch.Tensor]:
    inner = model.model
    parts = (inner.language_model.layers, inner.generation_head, inner.generation_aligner)
    return [weight for part in parts for weight in part.parameters()]


def _measured(name: str, dtype: str, draws: list[Drawn], task: Task, read: float, products: float) -> Measured:
    phases = {phase: median(drawn.seconds[phase] for drawn in draws) for phase in draws[0].seconds}
    first = {phase: median(drawn.first[phase] for drawn in draws) for phase in draws[0].first}
    if first:
        begins = next(iter(phases))
        phases[begins] = max(0.0, phases[begins] - sum(first.values()))
        phases = first | phases
    step = phases["image"] / task.image
    peaks = [drawn.peak for drawn in draws if drawn.peak is not None]
    return Measured(
        contender=name,
        dtype=dtype,
        seconds=median(sum(drawn.seconds.values()) for drawn in draws),
        phases=phases,
        step_s=step,
        bandwidth_frac=draws[0].step_bytes / step / read if step else None,
        products_frac=draws[0].step_products / step / products if step else None,
        peak=max(peaks) if peaks else None,
    )


def rendered(result: dict[str, Any]) -> Iterator[RichTable]:
    """Yields a table for each dtype."""
    task = Task(**result["task"])
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        what = f"{task.group} images of {task.image} tokens, prompt {task.prefix}, reasoning {task.text}"
        title = f"{result['size']['name']}, {dtype}: {what}, guidance {task.guidance:g}"
        table = RichTable(title=title, box=None, title_justify="left")
        table.add_column("contender", no_wrap=True)
        for name in ("s", "× ours", "tokens/s", "images/s", "ms a token", "of bandwidth", "of products", "memory MB"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("phases, s")
        ours = next((row["seconds"] for row in rows if row["contender"] == OURS), None)
        for row in rows:
            table.add_row(row["contender"], *([row["failed"]] if row["failed"] else _cells(row, ours, task)))
        yield table


def _cells(row: dict[str, Any], ours: float | None, task: Task) -> list[str]:
    took = row["seconds"]
    return [
        f"{took:.3g}",
        f"{took / ours:.2f}" if ours else "",
        f"{task.num_tokens / took:.4g}",
        f"{task.group / took:.3g}",
        f"{row['step_s'] * 1e3:.3g}",
        f"{row['bandwidth_frac']:.0%}" if row["bandwidth_frac"] else "",
        f"{row['products_frac']:.0%}" if row["products_frac"] else "",
        "not measured" if row["peak"] is None else f"{row['peak'] / 1e6:,.0f}",
        ", ".join(f"{phase} {value:.3g}" for phase, value in row["phases"].items()),
    ]
