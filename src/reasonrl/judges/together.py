"""Work in threads side by side, on the caller's GPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def together(works: Sequence[Callable[[], T]]) -> list[T]:
    """Returns what each returns, in order; all run at once, and the first to have raised, in order, raises here."""
    if len(works) < 2:
        return [work() for work in works]
    on_callers_gpu = _on_callers_gpu()
    futures: list[Future[T]] = [Future() for _ in works]

    def run(work: Callable[[], T], future: Future[T]) -> None:
        try:
            on_callers_gpu()
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            future.set_exception(error)

    # Daemons, as the judge's own thread is: a pool's threads, if they hang, keep the process alive.
    threads = [
        threading.Thread(target=run, args=pair, name=f"judges-{k}", daemon=True)
        for k, pair in enumerate(zip(works, futures, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [future.result() for future in futures]


def _on_callers_gpu() -> Callable[[], None]:
    torch = sys.modules.get("torch")  # whoever has a GPU in use has imported it
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)  # a thread begins on the first GPU, whatever its process uses
