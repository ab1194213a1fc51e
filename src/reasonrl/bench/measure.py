"""Seconds, peak memory and this machine's ceilings."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch.utils.benchmark import Timer

COMPONENTS = ("reasonrl", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(run: Callable[[], object], *, least_s: float) -> float:
    """Returns the median of the times of a call, repeated for at least `least_s`; the device's work is waited for."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least_s).median)


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
