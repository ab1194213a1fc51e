"""`reasonrl bench kernels|sampler|step|denoise|judges`: each prints tables and writes the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from reasonrl.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

bench = typer.Typer(help="Measure this machine, beside the peers that are installed on it.", no_args_is_help=True)
out = Console(highlight=False)
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: a GPU where there is one.")]
Only = Annotated[str, typer.Option(help="Only contenders whose name begins so: --only reasonrl.")]
SIZES_SAID = "tiny, heads, 90m, or Janus-Pro's 1b and 7b"


@bench.command("kernels")
def bench_kernels(
    device: Device = None,
    tables: Annotated[str, typer.Option(help="Which of logits, linear, guidance.")] = "logits,linear,guidance",
    rows: Annotated[str, typer.Option(help="Tokens N: 512,2048. Default: 512, on a GPU 8192 to 65536.")] = "",
    vocab: Annotated[str, typer.Option(help="Words V. Default: 16384,102400, the heads of Janus-Pro.")] = "",
    width: Annotated[str, typer.Option(help="Width H. Default: 2048, on a GPU 4096 too.")] = "",
    only: Only = "",
    least_s: Annotated[float, typer.Option("--seconds", min=0.0, help="Repeat each call for so long.")] = 1.0,
    path: Annotated[Path, typer.Option("--out", help="The JSON to write.")] = Path("bench-kernels.json"),
) -> None:
    """Time log-probs, policy loss and advantages.

    Beside torch, torch.compile, and trl, liger-kernel and cut-cross-entropy where they are installed: time, rate,
    share of this machine's measured ceiling, memory beyond operands and gradients, error against float64.
    """
    from reasonrl.bench import kernels

    result = kernels.run(
        kernels.named(tables),
        device=chosen(device),
        rows=whole_numbers("--rows", rows),
        vocab=whole_numbers("--vocab", vocab),
        width=whole_numbers("--width", width),
        only=only,
        least_s=least_s,
    )
    limits = result["ceilings"]
    report(result, kernels.rendered(result), path, f"peak: copy {limits['copy'] / 1e9:.3g} GB/s, {products(limits)}")


@bench.command("sampler")
def bench_sampler(
    device: Device = None,
    size: Annotated[str, typer.Option(help=f"{SIZES_SAID}. Default: 90m, on a GPU 1b.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float32 or both.")] = "bfloat16,float32",
    group: Annotated[int, typer.Option(help="Images of the prompt.")] = 16,
    prefix: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 100,
    text: Annotated[int, typer.Option(help="Tokens of reasoning before each image; 0 = images alone.")] = 0,
    image: Annotated[int | None, typer.Option(help="Tokens an image. Default: the size's own.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, above 1.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each contender draws once a round.")] = 3,
    only: Only = "",
    path: Annotated[Path, typer.Option("--out", help="The JSON to write.")] = Path("bench-sampler.json"),
) -> None:
    """Time reasoning and image tokens of a Janus model with random weights.

    Beside transformers' generate and the loop that trainers write: seconds, rates, memory beyond the weights, and
    the share of this machine's bandwidth and products that a token takes.
    """
    from reasonrl.bench import sampler
    from reasonrl.bench.models import named_dtypes, named_size
    from reasonrl.bench.samplers import Task

    where = chosen(device)
    model = named_size(size or ("1b" if where.type == "cuda" else "90m"))
    tokens = model.image_tokens if image is None else image
    task = Task(group=group, prefix=prefix, text=text, image=tokens, guidance=guidance)
    result = sampler.run(model, dtypes=named_dtypes(dtype), task=task, device=where, repeats=repeats, only=only)
    limits = result["ceilings"]
    report(
        result, sampler.rendered(result), path, f"ceilings: read {limits['read'] / 1e9:.3g} GB/s, {products(limits)}"
    )


@bench.command("step")
def bench_step(
    device: Device = None,
    size: Annotated[str, typer.Option(help=f"{SIZES_SAID}. Default: heads, on a GPU 1b.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32. Default: float32, on a GPU bfloat16.")] = "",
    group: Annotated[int, typer.Option(help="Trajectories.")] = 16,
    prefix: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 100,
    text: Annotated[int, typer.Option(help="Tokens of reasoning.")] = 100,
    image: Annotated[int | None, typer.Option(help="Tokens an image. Default: the size's own.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, above 1.")] = 5.0,
    rank: Annotated[int, typer.Option(help="Of the adapters that learn.")] = 32,
    full: Annotated[bool, typer.Option("--full", help="Every weight learns instead.")] = False,
    rows: Annotated[int | None, typer.Option(help="Trajectories that ours takes at once. Default: all.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Compute layers again in backward.")] = True,
    sample: Annotated[bool, typer.Option(help="Time the drawing too.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each contender takes one step a round.")] = 1,
    only: Only = "",
    path: Annotated[Path, typer.Option("--out", help="The JSON to write.")] = Path("bench-step.json"),
) -> None:
    """Time a training step of a Janus model with random weights.

    Beside the step that trainers write, with logits of every position: seconds by phase, peak memory beyond the
    weights, and the difference of both gradients. Also with the conditional log-probs that trainers use.
    """
    from reasonrl.bench import step
    from reasonrl.bench.models import named_dtypes, named_size
    from reasonrl.bench.samplers import Task
    from reasonrl.bench.steps import Job

    where = chosen(device)
    big = where.type == "cuda"
    model = named_size(size or ("1b" if big else "heads"))
    dtypes = named_dtypes(dtype or ("bfloat16" if big else "float32"))
    if len(dtypes) > 1:
        raise ConfigError(f"a step has one --dtype, got {dtype!r}")
    tokens = model.image_tokens if image is None else image
    task = Task(group=group, prefix=prefix, text=text, image=tokens, guidance=guidance)
    job = Job(task, rank=0 if full else rank, recomputes=checkpointing, num_rows=rows)
    result = step.run(model, dtype=dtypes[0], job=job, device=where, repeats=repeats, samples=sample, only=only)
    report(result, step.rendered(result), path, step.said_of_gradients(result))


@bench.command("denoise")
def bench_denoise(
    device: Device = None,
    size: Annotated[str, typer.Option(help="tiny, small or sd3.5-medium.")] = "small",
    full: Annotated[bool, typer.Option("--full", help="The same as --size sd3.5-medium.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32. Default: float32, on a GPU bfloat16.")] = "",
    group: Annotated[int, typer.Option(help="Pictures.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 10,
    trained: Annotated[int, typer.Option(help="The first so many of them are random and trained.")] = 4,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 = one branch.")] = 1.0,
    rank: Annotated[int, typer.Option(help="Of the adapters that learn; 0 = every weight learns.")] = 32,
    rows: Annotated[int | None, typer.Option(help="Pictures that are learned from at once. Default: all.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Compute layers again in backward.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each contender takes one step a round.")] = 1,
    only: Only = "",
    path: Annotated[Path, typer.Option("--out", help="The JSON to write.")] = Path("bench-denoise.json"),
) -> None:
    """Time an RL step of a transformer of Stable Diffusion 3 with random weights.

    One denoising step a pass, all trained steps at once, and the straight loop that trainers write: seconds by phase,
    peak memory beyond the weights, activations kept at once, the difference of gradients.
    """
    from reasonrl.bench import denoise
    from reasonrl.bench.denoisers import Job
    from reasonrl.bench.models import named_dtypes
    from reasonrl.bench.sd3 import FULL, named_model

    where = chosen(device)
    model = named_model(FULL if full else size)
    dtypes = named_dtypes(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    if len(dtypes) > 1:
        raise ConfigError(f"a step has one --dtype, got {dtype!r}")
    job = Job(group, steps, trained, guidance, rank, checkpointing, rows)
    result = denoise.run(model, dtype=dtypes[0], job=job, device=where, repeats=repeats, only=only)
    report(result, denoise.rendered(result), path, denoise.said_of(result))


@bench.command("judges")
def bench_judges(
    delays: Annotated[str, typer.Option(help="Milliseconds that the server takes, one row each.")] = "100,200,400",
    least_s: Annotated[float, typer.Option("--seconds", min=0.0, help="Of a round, at least.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of both, in turn.")] = 3,
    path: Annotated[Path, typer.Option("--out", help="The JSON to write.")] = Path("bench-judges.json"),
) -> None:
    """Time the client of OpenAI-compatible servers, and the cache of replies.

    Beside a load generator with ready requests, at 64 requests at a time, against a server process of this machine
    with 64 places and a fixed delay: requests a second of both, and the share. A warm cache: lookups a second.
    """
    from reasonrl.bench import judges

    result = judges.run([delay / 1e3 for delay in whole_numbers("--delays", delays)], least_s=least_s, repeats=repeats)
    targets = result["targets"]
    said = f"targets: {targets['share']:.0%} of the server's own rate, {targets['lookups']:,} lookups/s"
    report(result, judges.rendered(result), path, said)


def chosen(device: str | None) -> torch.device:
    """Returns the device to measure; raises ConfigError for one that this machine has not."""
    import torch

    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if device is not None and device.partition(":")[0] not in here:
        raise ConfigError(f"cannot measure on {device}: this machine has {' and '.join(here)}")
    return torch.device(device or here[-1])


def report(result: dict[str, Any], tables: Iterable[Table], path: Path, last: str) -> None:
    """Prints the tables, with a line under them, and writes the JSON; raises ConfigError where it cannot."""
    for table in tables:
        Console(width=max(out.width, 150)).print(table, "")
    out.print(last, markup=False, soft_wrap=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; the tables above hold the result"
        ) from error
    out.print(f"wrote {path}", markup=False)


def products(limits: dict[str, Any]) -> str:
    """Returns the rates of products, as a line says them."""
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in limits["products"].items())
    return f"products {rates}"


def whole_numbers(option: str, text: str) -> list[int]:
    """Returns the numbers of "512,2048"; raises ConfigError for what is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ConfigError(f"{option} takes whole numbers with commas between them, got {', '.join(wrong)}")
    return [int(part) for part in parts]
