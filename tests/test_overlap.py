"""Judging while the next prompts are drawn: the same run, in less time, and every failure still told."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from attrs import evolve, field, frozen
from hypothesis import given
from hypothesis import strategies as st
from tests.test_rollout import named

from reasonrl import Judge, JudgeError, Recipe, Trajectory, Verdict
from reasonrl.judges.together import together
from reasonrl.loop import Learner, train
from reasonrl.rollout import JudgeTime, parts_of, rollouts
from reasonrl.types import Score

Tiny = Callable[..., Recipe]


class Waiting(Judge):
    """Waits, as for a server, and remembers who judged what, and how many at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.seen: list[list[str]] = []
        self.inside = self.most = 0
        self.lock = threading.Lock()

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(self.seconds)
        self.seen.append([t.prompt.id for t in trajectories])
        with self.lock:
            self.inside -= 1
        return [Verdict.of("length", len(t.reasoning or "") / 100) for t in trajectories]


def step_of(recipe: Recipe, clock: JudgeTime | None = None) -> tuple[int, Sequence[Trajectory], Sequence[Verdict]]:
    return next(rollouts(recipe, recipe.read(), clock=clock)(Learner.of(recipe).weights))


@given(st.integers(0, 40), st.integers(1, 12))
def test_parts_are_the_prompts_in_order_and_of_one_size(number: int, parts: int) -> None:
    prompts = named(number)
    found = parts_of(prompts, parts)
    assert [p for part in found for p in part] == prompts
    assert len(found) == min(number, parts)
    sizes = [len(part) for part in found]
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("overlap", [2, 4, 99])
def test_an_overlapped_step_is_the_step_and_groups_stay_whole(tiny: Tiny, overlap: int) -> None:
    settings = {"prompts_per_step": 3, "group_size": 3}
    plain, apart = Waiting(), Waiting()
    _, drawn, verdicts = step_of(tiny(plain, **settings))
    _, again, found = step_of(tiny(apart, overlap=overlap, **settings))
    assert [(t.prompt.id, t.member) for t in again] == [(t.prompt.id, t.member) for t in drawn]
    for one, other in zip(drawn, again, strict=True):
        for stage, segment in one.segments.items():
            assert torch.equal(segment.actions, other.segments[stage].actions)
    assert found == verdicts
    assert len(plain.seen) == 1
    assert len(apart.seen) == min(overlap, 3)
    assert all(ids.count(i) == 3 for ids in apart.seen for i in ids)
    assert apart.most == 1  # one part at a time: a judge need not bear several threads


def test_an_overlapped_run_trains_to_the_same_weights(tiny: Tiny) -> None:
    def weights(overlap: int) -> list[torch.Tensor]:
        recipe = tiny(overlap=overlap, prompts_per_step=3)
        train(recipe, rollouts(recipe, recipe.read()))
        return [p.detach().clone() for p in recipe.policy.module.parameters()]

    for one, other in zip(weights(1), weights(3), strict=True):
        assert torch.allclose(one, other, atol=3e-5)  # batches of another size round otherwise: 4e-6, of 3e-3 moved


def test_the_clock_tells_how_much_judging_was_hidden(tiny: Tiny) -> None:
    def drawn(overlap: int) -> JudgeTime:
        clock = JudgeTime()
        step_of(tiny(Waiting(0.1), overlap=overlap, prompts_per_step=3), clock)
        return clock

    alone, apart = drawn(1), drawn(3)
    assert alone.busy_s >= 0.1
    assert apart.busy_s >= 0.3
    assert alone.hidden_frac == pytest.approx(0, abs=0.05)
    assert 0 < apart.hidden_frac < 1
    assert JudgeTime().hidden_frac is None


def test_the_first_part_that_raises_is_told_and_no_thread_is_left(tiny: Tiny) -> None:
    class Failing(Waiting):
        def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
            super().judge(trajectories)
            raise ConnectionError(f"part {len(self.seen)} is lost")

    with pytest.raises(JudgeError, match="part 1 is lost"):
        step_of(tiny(Failing(), overlap=2))
    assert not [t for t in threading.enumerate() if t.name.startswith("judg")]


def test_a_step_that_fails_to_draw_leaves_no_thread_waiting(tiny: Tiny) -> None:
    recipe = tiny(Waiting(), overlap=2)

    @frozen
    class Breaking:
        inner: object
        calls: list = field(factory=list)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def sample(self, prompts, *, group_size, draw):
            self.calls.append(len(prompts))
            if len(self.calls) == 2:
                raise RuntimeError("out of memory")
            return self.inner.sample(prompts, group_size=group_size, draw=draw)

    prompts, weights = recipe.read(), Learner.of(recipe).weights
    broken = evolve(recipe)
    object.__setattr__(broken, "policy", Breaking(recipe.policy))
    with pytest.raises(RuntimeError, match="out of memory"):
        next(rollouts(broken, prompts)(weights))
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name.startswith("judg")] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name.startswith("judg")]


def test_a_part_that_hangs_costs_its_own_time_and_no_other_part(tiny: Tiny) -> None:
    over = threading.Event()

    class Hanging(Waiting):
        def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
            if not self.seen:
                self.seen.append([])
                over.wait()
            return super().judge(trajectories)

    recipe = tiny(Hanging(), overlap=2, judge_timeout_s=0.2)
    _, _, verdicts = step_of(recipe)
    over.set()
    assert [v.total("image") is None for v in verdicts] == [True, True, False, False]
    assert verdicts[0].scores["judge"] == Score(None, "timed out: no verdict in 0.2 s")


# ---- several judges side by side ----


def test_works_side_by_side_return_in_order_and_leave_no_thread() -> None:
    gate = threading.Barrier(3)

    def work(number: int) -> int:
        gate.wait(10)
        return number

    assert together([lambda k=k: work(k) for k in range(3)]) == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("judges")]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_the_first_work_in_order_to_have_raised_is_told_after_all_are_done(error: type[BaseException]) -> None:
    done = []

    def late() -> None:
        time.sleep(0.05)
        done.append(1)
        raise error("first")

    def early() -> None:
        raise error("second")

    with pytest.raises(error, match="first"):
        together([late, early])
    assert done == [1]


HUNG = """
import time
from reasonrl import Judge, Prompt, Trajectory
from reasonrl.judges.together import together
from reasonrl.rollout import Guarded

class Hung(Judge):
    def judge(self, trajectories):
        return together([lambda: time.sleep(600)] * 2)

[verdict] = Guarded(Hung(), 0.1).judge([Trajectory(Prompt("a", "a"))])
print(verdict.scores["judge"].note)
"""


def test_judges_that_hang_side_by_side_do_not_keep_the_process_alive() -> None:
    found = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=100, check=True)
    assert found.stdout == "timed out: no verdict in 0.1 s\n"
