import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import Judge, PointwiseJudge, Recipe, Trajectory
from reasonrl.errors import ContractError, JudgeError, ReasonRLError
from reasonrl.judges import SceneSemantic
from reasonrl.loop import Learner
from reasonrl.noise import Draw
from reasonrl.rollout import Guarded, draw_trajectories, prompts_of_step, rollouts
from reasonrl.types import EVERY, Prompt, Score, Term, Verdict

HANG_S = 0.2
STAGES = ("reasoning", "image")
Tiny = Callable[..., Recipe]
Answers = Callable[[Sequence[Trajectory]], Any]

trajectories = [Trajectory(Prompt(str(i), "a red circle")) for i in range(4)]


class Answering(Judge):
    """Answers whatever the function says."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def judge(self, trajectories: Sequence[Trajectory]) -> Sequence[Verdict]:
        return self.answers(trajectories)


class Raising(PointwiseJudge):
    def score(self, trajectory: Trajectory) -> float:
        raise ConnectionError("the endpoint is down")


class Plain:
    """Draws nothing, `factor` times too often."""

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor

    def sample(self, prompts: Sequence[Prompt], *, group_size: int, draw: Draw) -> list[Trajectory]:
        return [Trajectory(p, (g,)) for p in prompts for g in range(group_size)] * self.factor


def numbers(*values: float | None) -> Answers:
    """Verdicts of a judge that checks nothing itself."""
    return lambda seen: [Verdict({EVERY: (Term("n", v),)}, {"n": Score(v)}) for v, _ in zip(values, seen, strict=True)]


def guarded(judge: Judge, timeout_s: float = 10.0) -> list[Verdict]:
    return Guarded(judge, timeout_s).judge(trajectories)


def blamed(judge: Judge, kind: type[ReasonRLError] = JudgeError) -> str:
    with pytest.raises(kind) as caught:
        guarded(judge)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_step(recipe: Recipe) -> tuple[int, Sequence[Trajectory], Sequence[Verdict]]:
    return next(rollouts(recipe, recipe.read())(Learner.of(recipe).weights))


@pytest.fixture
def hanging() -> Iterator[Judge]:
    """A judge that answers when the test is over."""
    over = threading.Event()
    yield Answering(lambda seen: over.wait() and [])
    over.set()


# ---- prompts ----

plans = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))


def named(number: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "a red circle") for i in range(number)]


@given(plans, st.integers(0, 200))
def test_prompts_never_repeat_within_a_step_and_fill_it(plan: tuple[int, int, int], step: int) -> None:
    size, number, seed = plan
    ids = [p.id for p in prompts_of_step(named(size), step, number=number, seed=seed)]
    assert len(ids) == min(size, number)
    assert len(set(ids)) == len(ids)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.integers(0, 5))
def test_every_prompt_comes_once_an_epoch_where_steps_divide_it(
    number: int, steps_an_epoch: int, seed: int, epoch: int
) -> None:
    prompts = named(number * steps_an_epoch)
    steps = range(epoch * steps_an_epoch, (epoch + 1) * steps_an_epoch)
    chosen = [p.id for s in steps for p in prompts_of_step(prompts, s, number=number, seed=seed)]
    assert sorted(chosen) == sorted(p.id for p in prompts)


@given(plans)
def test_every_prompt_comes_once_an_epoch_where_steps_straddle_it(
    plan: tuple[int, int, int],
) -> None:
    size, number, seed = plan
    number, epochs = min(number, size), 4
    num_steps = epochs * size // number
    chosen = Counter(
        p.id for step in range(num_steps) for p in prompts_of_step(named(size), step, number=number, seed=seed)
    )
    # Whole epochs less the few prompts that the last step would have begun: nobody is preferred.
    assert set(chosen.values()) <= {epochs - 1, epochs}


@given(plans, st.integers(0, 200))
def test_prompts_of_a_step_need_no_history(plan: tuple[int, int, int], step: int) -> None:
    size, number, seed = plan
    prompts = named(size)
    first = prompts_of_step(prompts, step, number=number, seed=seed)
    prompts_of_step(prompts, step + 1, number=number, seed=seed + 1)
    assert prompts_of_step(prompts, step, number=number, seed=seed) == first


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(step: int, seed: int) -> list[str]:
        return [p.id for p in prompts_of_step(named(20), step, number=20, seed=seed)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(step, seed)) for step in (0, 1) for seed in (0, 1)}) == 4


# ---- a judge that raises ----


def test_a_judge_that_raises_is_named_with_its_package() -> None:
    said = blamed(Raising())
    assert "judge Raising of package" in said
    assert "test_rollout (not an installed package)" in said
    assert "ConnectionError: the endpoint is down" in said


def test_the_part_of_an_expression_that_raises_is_blamed_not_the_expression() -> None:
    said = blamed(SceneSemantic().on("reasoning") + 0.5 * (Raising().named("x") * SceneSemantic()))
    assert "judge Raising of package" in said


def test_a_shipped_judge_that_raises_is_blamed_on_its_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: SceneSemantic, trajectory: Trajectory) -> float:
        raise ZeroDivisionError("no objects")

    monkeypatch.setattr(SceneSemantic, "score", broken)
    assert "judge SceneSemantic of package reasonrl " in blamed(SceneSemantic())


def test_what_a_judge_raises_on_several_lines_is_told_on_one() -> None:
    def answers(seen: Sequence[Trajectory]) -> list[Verdict]:
        raise ValueError("HTTP 500\n<html>\n</html>")

    assert "HTTP 500 <html> </html>" in blamed(Answering(answers))


class Panic(BaseException):
    """What libraries written in Rust raise: no Exception."""


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, Panic])
def test_a_judge_that_ends_by_no_exception_is_not_mistaken_for_a_slow_one(error: type[BaseException]) -> None:
    def answers(seen: Sequence[Trajectory]) -> list[Verdict]:
        raise error("3")

    assert "Answering" in blamed(Answering(answers))


# ---- a judge that hangs ----


def test_a_judge_that_hangs_leaves_all_unscored_in_time_and_says_why(hanging: Judge) -> None:
    started = time.perf_counter()
    verdicts = guarded(hanging, HANG_S)
    assert time.perf_counter() - started < 10 * HANG_S
    assert len(verdicts) == 4
    for verdict in verdicts:
        assert [verdict.total(stage) for stage in STAGES] == [None, None]
        assert [score.note for score in verdict.scores.values()] == ["timed out: no verdict in 0.2 s"]


def test_a_run_blinded_by_a_judge_that_hangs_stops_and_says_so(tiny: Tiny, hanging: Judge) -> None:
    with pytest.raises(JudgeError) as caught:
        first_step(tiny(hanging, judge_timeout_s=HANG_S))
    said = str(caught.value)
    assert "\n" not in said
    for part in ("step 0", "100%", "max_unscored=0.5", "timed out: no verdict in 0.2 s (4x)"):
        assert part in said


def test_a_run_that_allows_it_survives_a_judge_that_hangs(tiny: Tiny, hanging: Judge) -> None:
    _, drawn, verdicts = first_step(tiny(hanging, judge_timeout_s=HANG_S, max_unscored=1.0))
    assert len(verdicts) == len(drawn) == 4


# ---- a judge that answers nonsense ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_unscored_and_says_so(value: float) -> None:
    spoilt, *fine = guarded(Answering(numbers(value, 0.0, 0.5, 1.0)))
    assert spoilt.total() is None
    assert spoilt.scores["n"].value is None
    assert spoilt.scores["n"].note == f"not finite: {value}"
    assert [v.total() for v in fine] == [0.0, 0.5, 1.0]


def test_an_abstention_keeps_the_note_of_the_judge() -> None:
    silent = Verdict.of("n", Score(None, "the image is blank"))
    [kept, *_] = guarded(Answering(lambda seen: [silent] * len(seen)))
    assert kept == silent


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_goes_on_with_the_trajectories_that_were_scored(tiny: Tiny, value: float) -> None:
    _, _, verdicts = first_step(tiny(Answering(numbers(value, 0.0, 0.5, 1.0))))
    assert [v.total("image") for v in verdicts] == [None, 0.0, 0.5, 1.0]


def test_a_run_stops_where_more_than_the_allowed_share_is_unscored(tiny: Tiny) -> None:
    judge = Answering(numbers(math.nan, math.nan, math.nan, 1.0))
    with pytest.raises(JudgeError, match=r"75% .* max_unscored=0\.5: n: not finite: nan \(3x\)"):
        first_step(tiny(judge))
    first_step(tiny(judge, max_unscored=0.75))


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_wrong_number_of_verdicts_is_refused_by_the_name_of_the_judge(number: int) -> None:
    said = blamed(Answering(lambda seen: [Verdict.of("n", 1.0)] * number), ContractError)
    assert said.startswith(f"Answering returned {number} verdicts for 4 trajectories")


@pytest.mark.parametrize("answer", [0.5, None, {"n": 1.0}, "good"])
def test_answers_that_are_no_verdicts_are_refused_by_the_name_of_the_judge(answer: object) -> None:
    assert "Answering" in blamed(Answering(lambda seen: [answer] * len(seen)), ReasonRLError)


def test_a_judge_that_returns_nothing_is_refused_by_name() -> None:
    assert "Answering" in blamed(Answering(lambda seen: None), ReasonRLError)


def test_a_judge_never_sees_segments(tiny: Tiny) -> None:
    seen: list[Trajectory] = []

    def answers(given: Sequence[Trajectory]) -> list[Verdict]:
        seen.extend(given)
        return [Verdict.of("n", 1.0)] * len(given)

    first_step(tiny(Answering(answers)))
    assert [dict(t.segments) for t in seen] == [{}] * 4
    assert all(t.image is not None for t in seen)


# ---- prompts and policies that break their promise ----


def test_prompt_ids_that_repeat_are_refused() -> None:
    twice = [Prompt("cup", "a red cup"), Prompt("b", "b"), Prompt("cup", "a blue cup")]
    with pytest.raises(ContractError, match=r"must differ within a step, \['cup'\] repeat"):
        draw_trajectories(Plain(), None, twice, group_size=2, draw=Draw(0, 0))


@pytest.mark.parametrize("factor", [0, 2])
def test_a_policy_that_draws_a_wrong_number_is_refused_by_name(factor: int) -> None:
    with pytest.raises(ContractError, match=f"Plain returned {factor * 6} .* 3 prompts x 2"):
        draw_trajectories(Plain(factor), None, named(3), group_size=2, draw=Draw(0, 0))


def test_rollouts_without_a_judge_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ContractError, match="give a judge"):
        rollouts(evolve(tiny(), judge=None), named(2))


def test_rollouts_start_where_a_run_left_off_with_the_same_draws(tiny: Tiny) -> None:
    recipe = tiny(SceneSemantic(), steps=2)
    weights = Learner.of(recipe).weights
    whole = list(rollouts(recipe, recipe.read())(weights))
    [(step, drawn, verdicts)] = rollouts(recipe, recipe.read(), start=1)(weights)
    assert step == 1
    assert [t.reasoning for t in drawn] == [t.reasoning for t in whole[1][1]]
    assert [t.prompt.id for t in drawn] == [t.prompt.id for t in whole[1][1]]
    assert verdicts == whole[1][2]
