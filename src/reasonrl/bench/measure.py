"""Seconds, peak memory, this machine's ceilings, and a process of one's own to measure in."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch.utils.benchmark import Timer

COMPONENTS = (
    "reasonrl",
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "peft",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)
Result = TypeVar("Result")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(run: Callable[[], object], *, least_s: float) -> float:
    """Returns the median of the times of a call, repeated for at least `least_s`; the device's work is waited for."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least_s).median)


class Stopwatch:
    """Adds up seconds by phase; the device's work is waited for at both ends of a phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what happens inside to a phase."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def apart(work: Callable[[], Result], device: torch.device) -> Result | str:
    """Returns what `work` returns, or one line that says why it failed: a peer that breaks is a result.

    On a CPU it runs in a process of its own, whose memory is its own, with as many threads: `work` must pickle.
    """
    try:
        if device.type == "cuda":
            return work()
        threads = (torch.get_num_threads(),)
        context = get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
            return pool.submit(work).result()
    except torch.OutOfMemoryError:
        return "out of memory"
    except BrokenProcessPool:
        return "its process died: out of memory?"
    except Exception as error:  # noqa: BLE001 - a peer may break in any way, and the other rows are still wanted
        return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Returns how far a call's memory rises above what is held before it; None where the system does not tell.

    On CUDA the allocator's count, on a CPU the process's resident pages: measure it in a process of its own.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        held = run()
        torch.cuda.synchronize(device)
        del held
        return torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        return None
    give_back_freed_pages()
    _CLEAR.write_text("5")  # the high-water mark starts again
    before = _resident("VmRSS")
    held = run()
    del held
    return max(0, _resident("VmHWM") - before)


def give_back_freed_pages() -> None:
    """Empties the C library's store of freed memory, where it has one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


@frozen
class Ceilings:
    """The most this machine does: bytes read and written a second, and operations a second by dtype."""

    copy: float
    products: dict[str, float]


def ceilings(device: torch.device, *, least_s: float = 0.3) -> Ceilings:
    """Returns the rates of a plain copy and of torch's own square products, in bfloat16 and float32."""
    big = device.type == "cuda"
    source = torch.zeros(2**32 if big else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(partial(target.copy_, source), least_s=least_s)
    del source, target  # 8 GB on a GPU
    side = 8192 if big else 2048
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / seconds(partial(torch.mm, left, right), least_s=least_s)
        products[str(dtype).removeprefix("torch.")] = rate
    return Ceilings(copy, products)


def read_rate(device: torch.device, *, least_s: float = 0.3) -> float:
    """Returns bytes a second that a sum reads of a buffer no cache holds: the ceiling of a step of decoding."""
    values = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    return values.nbytes / seconds(values.sum, least_s=least_s)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what a figure needs beside it: processor or GPU, threads, versions, the day."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in COMPONENTS if (version := _version(name)) is not None},
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
