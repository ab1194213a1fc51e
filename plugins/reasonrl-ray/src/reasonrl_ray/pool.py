"""A pool of actors: parts go to whoever is free, the dead are replaced, the hung are given up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from attrs import define, field

from reasonrl import Judge, JudgeError, PointwiseJudge, ReasonRLError, Score, Term, Trajectory, Verdict
from reasonrl.interfaces.judge import Named, checked, with_terms
from reasonrl.registry import one_line
from reasonrl_ray.cluster import cluster
from reasonrl_ray.parts import Part, split

TIMED_OUT = "timed out"
DIED = "actor died"


class Actor:
    """What lives in an actor's process."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def ready(self) -> bool:
        """Returns True once the process is up and the judge unpickled."""
        return True

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the judge's verdicts; what it raises beside ReasonRLErrors is a JudgeError, which always pickles."""
        try:
            return checked(self._judge, trajectories)
        except ReasonRLError:
            raise
        except Exception as error:
            raise JudgeError(_blame(self._judge, error)) from error


@define(eq=False)
class Seat:
    """One place in the pool, and what its actor is doing."""

    actor: Any = None
    doing: Any = None
    """The reference that is awaited; None = idle."""
    part: Part | None = None
    """What it judges; None while it starts, or idle."""
    failed_starts: int = 0
    """In this batch."""
    why: str = ""
    """It failed to start."""


@define(eq=False)
class Pool:
    """The actors of one judge; one batch at a time."""

    judge: Judge
    num_actors: int
    num_cpus: float
    num_gpus: float
    max_restarts: int
    timeout_s: float
    address: str | None
    _lock: Any = field(factory=threading.RLock)
    _seats: list[Seat] = field(factory=list)
    _job: str | None = None
    _owed: bool = False
    _shape: Verdict | None = None
    """A verdict of the judge: what an abstention has to look like."""

    def judged(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one verdict each, in order; what no actor answered in time, or survived, is None with the reason.

        Raises what the judge raised, if it is a ReasonRLError, and JudgeError for any other exception of it.
        """
        if not trajectories:
            return []
        if not self._lock.acquire(timeout=self.timeout_s):
            return [self._silent(f"{TIMED_OUT} after {self.timeout_s:g} s: the actors are busy")] * len(trajectories)
        try:
            self._connect()
            answers = self._answers([trajectory.shown() for trajectory in trajectories])
            self._shape = next((a for a in answers if isinstance(a, Verdict)), self._shape)
            return [self._silent(answer) if isinstance(answer, str) else answer for answer in answers]
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the actors, and the Ray that was started for them if nobody else uses it."""
        with self._lock:
            if self._job is not None and self._connected():
                for seat in self._seats:
                    self._vacate(seat)
            self._seats, self._job = [], None
            if self._owed:
                self._owed = False
                cluster().leave(**self._claim)

    # ---- one batch ----

    def _answers(self, trajectories: Sequence[Trajectory]) -> list[Verdict | str]:
        """Returns a verdict or a reason for each row."""
        waiting = deque(split(trajectories, self.num_actors))
        answers: list[Verdict | str] = [""] * len(trajectories)
        deadline = time.monotonic() + self.timeout_s
        for seat in self._seats:
            seat.failed_starts = 0
        try:
            while waiting or any(seat.part for seat in self._seats):
                if not self._hand_out(waiting, trajectories):  # no actor starts
                    return [answer or f"{DIED}: while starting: {self._seats[0].why}" for answer in answers]
                done = self._first_done(deadline - time.monotonic())
                if done is None:
                    return [answer or self._late() for answer in answers]
                self._settle(done, waiting, answers)
        finally:
            for seat in self._seats:
                if seat.part is not None:  # hung, or overtaken by another's error: nobody waits for it
                    self._vacate(seat)
        return answers

    def _hand_out(self, waiting: deque[Part], trajectories: Sequence[Trajectory]) -> bool:
        """Gives idle actors parts and empty seats actors; returns whether anything is going on."""
        for seat in self._seats:
            if seat.actor is None and seat.failed_starts <= self.max_restarts:
                self._start(seat)
            if seat.actor is not None and seat.doing is None and waiting:
                seat.part = waiting.popleft()
                seat.doing = seat.actor.judge.remote([trajectories[row] for row in seat.part.rows])
        return any(seat.doing is not None for seat in self._seats)

    def _first_done(self, timeout_s: float) -> Seat | None:
        import ray

        busy = {seat.doing: seat for seat in self._seats if seat.doing is not None}
        done, _ = ray.wait(list(busy), num_returns=1, timeout=max(0.0, timeout_s))
        return busy[done[0]] if done else None

    def _settle(self, seat: Seat, waiting: deque[Part], answers: list[Verdict | str]) -> None:
        """Takes what a seat has to say."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        part = seat.part
        try:
            found = ray.get(seat.doing)
        except RayTaskError as error:
            raise self._of_the_judge(error) from error
        except RayError as error:
            self._bury(seat, error, waiting, answers)
            return
        seat.doing = seat.part = None
        if part is not None:
            for row, verdict in zip(part.rows, found, strict=True):
                answers[row] = verdict

    def _of_the_judge(self, error: Any) -> ReasonRLError:
        """Returns what the judge raised in its actor, as the caller would see it without Ray."""
        cause = error.cause
        if isinstance(cause, ReasonRLError):
            return cause
        return JudgeError(_blame(self.judge, cause or error))

    def _bury(self, seat: Seat, error: Exception, waiting: deque[Part], answers: list[Verdict | str]) -> None:
        """Empties the seat; its part is judged again group by group, or has died often enough."""
        part, why = seat.part, _why(error)
        self._vacate(seat)
        if part is None:
            seat.failed_starts += 1
            seat.why = why
        elif part.deaths < self.max_restarts:
            waiting.extend(part.apart())
        else:
            for row in part.rows:
                answers[row] = f"{DIED}: {part.deaths + 1} times, at last: {why}"

    def _late(self) -> str:
        """Returns why there is no answer in time."""
        note = f"{TIMED_OUT} after {self.timeout_s:g} s on Ray"
        if any(seat.part is not None for seat in self._seats):
            return note
        return f"{note}: no actor started, each reserves {self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"

    # ---- actors ----

    def _connect(self) -> None:
        """Makes sure of a Ray and of seats; after a new Ray, of new ones."""
        if self._job is not None and self._connected():
            return
        self._owed = cluster().enter(self.address, **self._claim)
        self._job = _job()
        self._seats = [Seat() for _ in range(self.num_actors)]

    @property
    def _claim(self) -> dict[str, float]:
        return {"cpus": self.num_actors * self.num_cpus, "gpus": self.num_actors * self.num_gpus}

    def _connected(self) -> bool:
        import ray

        return bool(ray.is_initialized()) and _job() == self._job

    def _start(self, seat: Seat) -> None:
        import ray

        remote = ray.remote(Actor).options(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_restarts=0)
        seat.actor = remote.remote(self.judge)
        seat.doing = seat.actor.ready.remote()

    def _vacate(self, seat: Seat) -> None:
        import ray

        if seat.actor is not None:
            ray.kill(seat.actor)
        seat.actor = seat.doing = seat.part = None

    def _silent(self, note: str) -> Verdict:
        """Returns an abstention with the terms of the judge, as far as they are known."""
        if self._shape is not None:
            silent = with_terms(self._shape, lambda term: Term(term.name, None, term.weight))
            return Verdict(silent.terms, {name: Score(None, note) for name in self._shape.scores})
        name = self.judge.name if isinstance(self.judge, PointwiseJudge | Named) else type(self.judge).__name__
        term = Term(name, None)
        return Verdict(dict.fromkeys(self.judge.stages, (term,)), {name: Score(None, note)})


def _blame(judge: Judge, error: BaseException) -> str:
    return f"judge {type(judge).__name__} raised {one_line(error)[:300]} on Ray"


def _job() -> str:
    """Returns which connection to Ray this is."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


def _why(error: Exception) -> str:
    """Returns the telling sentence of Ray's several lines."""
    said = one_line(error)
    start = said.find("The actor is dead because")
    return said[max(0, start) :][:200]
