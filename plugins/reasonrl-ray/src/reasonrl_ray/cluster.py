"""The Ray of this process: found, or started when first needed; only what was started here is stopped here."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from attrs import define, field

from reasonrl import ConfigError
from reasonrl.registry import one_line


@cache
def cluster() -> Cluster:
    """Returns the one of this process."""
    return Cluster()


@define(eq=False)
class Cluster:
    """Counts who uses a Ray that we connected to; the last to leave disconnects, which stops it if it is ours."""

    _lock: Any = field(factory=threading.Lock)
    _claims: list[tuple[float, float]] = field(factory=list)
    """CPUs and GPUs of each user."""
    _keeper: threading.Thread | None = None
    _local: bool = False
    _left: threading.Event = field(factory=threading.Event)

    def enter(self, address: str | None, *, cpus: float, gpus: float) -> bool:
        """Connects, and returns whether `leave` is owed; False where the process had a Ray already.

        Raises ConfigError where there is none at `address`, or where one started here lacks what is asked for.
        """
        with self._lock, contained():
            import ray

            if self._keeper is not None and not ray.is_initialized():  # somebody else shut it down
                self._end()
            if self._keeper is None and ray.is_initialized():
                return False
            if self._keeper is None:
                self._begin(address, cpus=cpus)
            self._claims.append((cpus, gpus))
            try:
                self._refuse_too_much()
            except ConfigError:
                self._drop((cpus, gpus))
                raise
            return True

    def leave(self, *, cpus: float, gpus: float) -> None:
        """Gives up one `enter`; the last one waits until what was started is gone."""
        with self._lock:
            self._drop((cpus, gpus))

    def _drop(self, claim: tuple[float, float]) -> None:
        if claim in self._claims:  # not after somebody else's shutdown
            self._claims.remove(claim)
        if not self._claims:
            self._end()

    def _refuse_too_much(self) -> None:
        """Actors beyond what a machine has would wait forever; a cluster may grow, so there they may wait."""
        import ray

        if not self._local:
            return
        for kind, asked in zip(("CPU", "GPU"), map(sum, zip(*self._claims, strict=True)), strict=True):
            found = ray.cluster_resources().get(kind, 0.0)
            if asked > found:
                raise ConfigError(
                    f"the actors of {len(self._claims)} pools reserve {asked:g} {kind}s, the Ray started here has"
                    f" {found:g}: lower num_{kind.lower()}s or num_actors"
                )

    def _begin(self, address: str | None, *, cpus: float) -> None:
        failure: list[BaseException] = []
        connected, self._left = threading.Event(), threading.Event()

        def keep(left: threading.Event) -> None:
            import ray

            try:
                with contained():
                    self._local = _connect(address, cpus=cpus)
            except Exception as error:  # noqa: BLE001 - handed to the thread that waits for it
                failure.append(error)
                return
            finally:
                connected.set()
            left.wait()
            ray.shutdown()

        # Ray's processes die with the *thread* that started them (PR_SET_PDEATHSIG), and a judge's thread ends with
        # its step. And from a thread of its own, Ray cannot put its handler in place of the program's SIGTERM.
        self._keeper = threading.Thread(target=keep, args=(self._left,), name="reasonrl-ray", daemon=True)
        self._keeper.start()
        connected.wait()
        if failure:
            self._end()
            raise ConfigError(
                f"cannot connect to Ray at {address!r}: {one_line(failure[0])[:200]}; give the address of a running"
                " one, or None to start one here"
            ) from failure[0]

    def _end(self) -> None:
        self._left.set()
        if self._keeper is not None:
            self._keeper.join()
        self._keeper = None
        self._claims.clear()


def _connect(address: str | None, *, cpus: float) -> bool:
    """Connects, and returns whether the Ray was started for it."""
    import ray

    quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    if address not in (None, "local"):
        ray.init(address=address, **quiet)
        return False
    if address is None:
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **quiet)
            return False
    ray.init(address="local", num_cpus=max(math.ceil(cpus), os.cpu_count() or 1), include_dashboard=False, **quiet)
    return True


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keeps what importing ray and connecting change in this process: the excepthook and PYTHONBREAKPOINT."""
    hook, breakpoint_hook = sys.excepthook, os.environ.get("PYTHONBREAKPOINT")
    try:
        yield
    finally:
        sys.excepthook = hook
        if breakpoint_hook is None:
            os.environ.pop("PYTHONBREAKPOINT", None)
        else:
            os.environ["PYTHONBREAKPOINT"] = breakpoint_hook
