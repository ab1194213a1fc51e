"""Work in threads side by side, on the caller's GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def together(works: Sequence[Callable[[], T]]) -> list[T]:
    """Returns what each returns, in order; all run at once, and the first to have raised, in order, raises here."""
    if len(works) < 2:
        return [work() for work in works]
    with ThreadPoolExecutor(len(works), "judges", initializer=_on_callers_gpu()) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def _on_callers_gpu() -> Callable[[], None]:
    torch = sys.modules.get("torch")  # whoever has a GPU in use has imported it
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)  # a thread begins on the first GPU, whatever its process uses
