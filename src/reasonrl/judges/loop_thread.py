"""What all calls of one server share: a loop in a thread and its connections while somebody asks, the breaker always.

A call may come from any thread, also from a notebook whose own loop is running; so the loop is never the caller's.
The first caller starts it, the last one stops it, and nothing is left: no thread, no socket.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, final

from attrs import define, field

from reasonrl.judges.retries import Breaker

if TYPE_CHECKING:
    from httpcore2 import AsyncConnectionPool

T = TypeVar("T")


@define(eq=False)
class _Users:
    """Those who ask in one process."""

    breaker: Breaker
    draw: random.Random = field(factory=random.Random)
    """Its own: jitter must not move the draws of a run."""
    lock: threading.Lock = field(factory=threading.Lock)
    number: int = 0
    session: Session | None = None


@final
class Shared:
    """The breaker, and the session of those who ask now. A copy, a pickled one or a forked one starts afresh."""

    def __init__(self, concurrency: int, breaker: Callable[[], Breaker], secure: bool) -> None:
        self._arguments = (concurrency, breaker, secure)
        self._processes: dict[int, _Users] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Shared, self._arguments)

    @property
    def users(self) -> _Users:
        """Those of this process: a forked one has its parent's memory, and none of its threads."""
        found = self._processes.get(os.getpid())
        return found or self._processes.setdefault(os.getpid(), _Users(self._arguments[1]()))

    @property
    def breaker(self) -> Breaker:
        """Lets attempts through, or holds them back."""
        return self.users.breaker

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Yields the session, which lives until the last of its users leaves."""
        users = self.users
        with users.lock:
            concurrency, _, secure = self._arguments
            session = users.session = users.session or Session(concurrency, secure=secure)
            users.number += 1
        try:
            yield session
        finally:
            with users.lock:
                users.number -= 1
                if not users.number:
                    users.session = None
                    session.close()


@final
class Session:
    """A loop in a thread, and `concurrency` places for requests, each with a connection of its own that is kept."""

    def __init__(self, concurrency: int, *, secure: bool) -> None:
        self._concurrency = concurrency
        self._secure = secure
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="reasonrl-server", daemon=True)
        self._thread.start()
        self._loop, self._over = self._started.result()

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what the coroutine returns, run on the loop; a caller that is interrupted takes it along."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @asynccontextmanager
    async def place(self) -> AsyncIterator[AsyncConnectionPool]:
        """Yields a place, when one is free: the one used last, whose connection is the freshest."""
        place = await self._free.get()
        try:
            yield place
        finally:
            self._free.put_nowait(place)

    def close(self) -> None:
        """Stops the loop and waits until its thread, its helpers and its connections are gone."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)  # what keeps it from starting is the caller's to know

    async def _live(self) -> None:
        import httpcore2

        over = asyncio.Event()
        # Made once: each connection would read the machine's certificates again.
        trusted = httpcore2.default_ssl_context() if self._secure else None
        # A pool of many connections looks at all of them for each request; so a place is a pool of one.
        self._free: asyncio.LifoQueue[AsyncConnectionPool] = asyncio.LifoQueue()
        async with AsyncExitStack() as places:
            for _ in range(self._concurrency):
                place = httpcore2.AsyncConnectionPool(trusted, max_connections=1)
                self._free.put_nowait(await places.enter_async_context(place))
            self._started.set_result((asyncio.get_running_loop(), over))
            await over.wait()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:  # of callers that were interrupted
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
