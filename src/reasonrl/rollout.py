"""Experience: prompts to judged trajectories, or demonstrations from data; failures accounted for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from attrs import define, evolve, field, frozen

from reasonrl import registry
from reasonrl.distributed import World, launched, part_of
from reasonrl.errors import ContractError, JudgeError, ReasonRLError
from reasonrl.interfaces import Judge, Policy, Renderer, Teachable, Trainable
from reasonrl.interfaces.judge import checked, with_terms
from reasonrl.noise import Draw
from reasonrl.recipe import Recipe
from reasonrl.types import FAULT, Prompt, Score, Stop, Term, Trajectory, Verdict
from reasonrl.weights import Weights

Judged = tuple[int, Sequence[Trajectory], Sequence[Verdict]]
Experience = Callable[[Mapping[Trainable, Weights]], Iterator[Judged]]


@define
class JudgeTime:
    """Seconds of this process's judging in the last step: of the judge, and of waiting with nothing else to do."""

    busy_s: float = 0.0
    waited_s: float = 0.0

    @property
    def hidden_frac(self) -> float | None:
        """The fraction that sampling hid, in [0, 1]; None where nothing was judged."""
        return None if self.busy_s <= 0 else min(1.0, max(0.0, 1 - self.waited_s / self.busy_s))


def prompts_of_step(prompts: Sequence[Prompt], step: int, *, number: int, seed: int) -> list[Prompt]:
    """Returns the prompts of a step: epochs of seeded shuffles, a function of (seed, step) alone.

    Fewer prompts than `number` gives each once a step.
    """
    size, number = len(prompts), min(number, len(prompts))
    epoch, offset = divmod(step * number, size)
    order = _order(size, number, seed, epoch)[offset : offset + number]
    order += _order(size, number, seed, epoch + 1)[: number - len(order)] if len(order) < number else ()
    return [prompts[i] for i in order]


@lru_cache(maxsize=4)
def _order(size: int, number: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Returns an epoch's shuffle; a step that ends one epoch and begins the next holds nothing twice."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    begun = epoch * size % number  # prompts of the straddling step that the epoch before gave
    if not begun:
        return tuple(order)
    taken = set(_order(size, number, seed, epoch - 1)[size - begun :])
    first = [i for i in order if i not in taken][: number - begun]
    return (*first, *(i for i in order if i not in set(first)))


def rollouts(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    *,
    start: int = 0,
    world: World | None = None,
    clock: JudgeTime | None = None,
) -> Experience:
    """Returns the experience of a run: sample, render, judge, from step `start` to the recipe's last.

    With several processes each draws and judges its part of a step's prompts, which may be none. `clock` is told how
    long judging took in each step, and how much of it was waited for.
    """
    if recipe.judge is None:
        raise ContractError("rollouts need recipe.judge, got None: give a judge, or train on demonstrations")
    judge = Guarded(recipe.judge, recipe.judge_timeout_s)
    world = world or launched()
    clock = clock or JudgeTime()

    def experience(weights: Mapping[Trainable, Weights]) -> Iterator[Judged]:
        for step in range(start, recipe.steps):
            draw = Draw(recipe.seed, step)
            every = prompts_of_step(prompts, step, number=recipe.prompts_per_step, seed=recipe.seed)
            _refuse_repeats(every)
            mine = part_of(every, world)
            trajectories: list[Trajectory] = []
            with Judging(judge) as judging:
                with _sampling_weights(recipe, weights), world.whole(recipe.trainables), world.agreed():
                    for part in parts_of(mine, recipe.overlap):
                        drawn = draw_trajectories(
                            recipe.policy, recipe.renderer, part, group_size=recipe.group_size, draw=draw
                        )
                        trajectories += drawn
                        judging.add([t.shown() for t in drawn])
                with world.agreed():
                    verdicts = judging.finish()
            clock.busy_s, clock.waited_s = judging.busy_s, judging.waited_s
            said = world.gather(verdicts)
            with world.agreed():
                _stop_if_blind(recipe, step, said)
            yield step, trajectories, verdicts

    return experience


def parts_of(prompts: Sequence[Prompt], number: int) -> list[Sequence[Prompt]]:
    """Returns the prompts in at most so many parts of nearly one size, in order; none is empty."""
    number = min(number, len(prompts))
    cuts = [round(i * len(prompts) / number) for i in range(number + 1)] if number else [0]
    return [prompts[start:stop] for start, stop in pairwise(cuts)]


def demonstrations(
    recipe: Recipe, step_of: Callable[[int], Sequence[Trajectory]], *, start: int = 0, world: World | None = None
) -> Experience:
    """Returns supervised experience: `step_of(step)` gives texts and images, the policy encodes them as actions.

    With several processes each takes its part, prompts whole.
    """
    if not isinstance(recipe.policy, Teachable):
        raise ContractError(f"{type(recipe.policy).__name__} cannot learn from demonstrations: it is no Teachable")
    teachable = recipe.policy
    world = world or launched()

    def experience(weights: Mapping[Trainable, Weights]) -> Iterator[Judged]:
        for step in range(start, recipe.steps):
            with world.whole(recipe.trainables), world.agreed():
                shown = step_of(step)
                mine = set(part_of(list(dict.fromkeys(t.prompt.id for t in shown)), world))
                trajectories = teachable.encode([t for t in shown if t.prompt.id in mine])
            yield step, trajectories, [Verdict({}) for _ in trajectories]

    return experience


def draw_trajectories(
    policy: Policy,
    renderer: Renderer | None,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    draw: Draw,
) -> list[Trajectory]:
    """Returns sampled and rendered trajectories; ContractError where ids repeat or addresses collide."""
    if not prompts:
        return []
    _refuse_repeats(prompts)
    trajectories = policy.sample(prompts, group_size=group_size, draw=draw)
    if len(trajectories) != len(prompts) * group_size:
        raise ContractError(
            f"{type(policy).__name__} returned {len(trajectories)} trajectories for {len(prompts)} prompts x"
            f" {group_size}: sample() must draw whole groups"
        )
    return trajectories if renderer is None else renderer.render(trajectories, draw=draw)


def _refuse_repeats(prompts: Sequence[Prompt]) -> None:
    repeated = sorted(i for i, n in Counter(p.id for p in prompts).items() if n > 1)
    if repeated:
        raise ContractError(f"prompt ids must differ within a step, {repeated[:3]} repeat: noise would be shared")


@frozen
class Guarded:
    """A judge behind the three guards of a run: its time, its number of verdicts, and finite values."""

    part: Judge
    timeout_s: float

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one clean verdict each; a judge out of time leaves all unscored; one that raises is a JudgeError.

        What could not be drawn (Stop.FAULT) is unscored, and no judge sees it.
        """
        drawn = [t for t in trajectories if t.stop is not Stop.FAULT]
        verdicts = iter(self._asked(drawn) if drawn else ())
        return [
            _silent(f"not drawn: {t.artifacts.get(FAULT, 'no reason given')}")
            if t.stop is Stop.FAULT
            else next(verdicts)
            for t in trajectories
        ]

    def _asked(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        outcome: list[list[Verdict] | BaseException] = []
        device = _device()

        def work() -> None:
            try:
                _use(device)
                outcome.append(checked(self.part, trajectories))
            except BaseException as error:  # noqa: BLE001 - a panic of Rust code too: the caller's thread raises it
                outcome.append(error)

        # A daemon, so that a judge that hangs cannot keep the process alive.
        thread = threading.Thread(target=work, name="judge", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            return [_silent(f"timed out: no verdict in {self.timeout_s:g} s") for _ in trajectories]
        if isinstance(outcome[0], ReasonRLError):
            raise outcome[0]
        if isinstance(outcome[0], BaseException):
            raise JudgeError(_blame(self.part, outcome[0])) from outcome[0]
        return [_clean(verdict) for verdict in outcome[0]]


@define(eq=False)
class Judging:
    """A step's judging, part by part, while the next part is drawn; one part at a time, in order."""

    judge: Guarded
    busy_s: float = 0.0
    waited_s: float = 0.0
    _parts: queue.SimpleQueue[list[Trajectory] | None] = field(factory=queue.SimpleQueue, init=False)
    _found: list[list[Verdict] | Exception] = field(factory=list, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.put(None)  # where drawing failed: the thread ends with the part it is at

    def add(self, trajectories: list[Trajectory]) -> None:
        """Begins to judge a part as soon as those before it are done."""
        self._parts.put(trajectories)
        if self._thread is None:
            # A daemon, as the judge's own thread is: an interrupted run ends at once.
            self._thread = threading.Thread(target=self._work, args=(_device(),), name="judging", daemon=True)
            self._thread.start()

    def finish(self) -> list[Verdict]:
        """Returns the verdicts of every part, in order; raises what the judge raised, the first part's first."""
        if self._thread is None:
            return []
        self._parts.put(None)
        since = time.perf_counter()
        self._thread.join()
        self.waited_s = time.perf_counter() - since
        verdicts: list[Verdict] = []
        for found in self._found:
            if isinstance(found, Exception):
                raise found
            verdicts += found
        return verdicts

    def _work(self, device: int | None) -> None:
        _use(device)
        while (part := self._parts.get()) is not None:
            since = time.perf_counter()
            try:
                self._found.append(self.judge.judge(part))
            except Exception as error:  # noqa: BLE001 - finish() raises it in the run's thread
                self._found.append(error)
            self.busy_s += time.perf_counter() - since


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _use(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # a thread begins on the first GPU, whatever its process uses


def _silent(note: str) -> Verdict:
    return Verdict({}, {"judge": Score(None, note)})


def _clean(verdict: Verdict) -> Verdict:
    scores = {
        name: score if _is_fine(score.value) else Score(None, f"not finite: {score.value}", score.cost)
        for name, score in verdict.scores.items()
    }
    return Verdict(with_terms(verdict, _finite).terms, scores)


def _finite(term: Term) -> Term:
    return term if _is_fine(term.value) else evolve(term, value=None)


def _is_fine(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _blame(judge: Judge, error: BaseException) -> str:
    origin = error.__traceback__
    inner = None
    while origin is not None:
        owner = origin.tb_frame.f_locals.get("self")
        inner = type(owner) if isinstance(owner, Judge) else inner
        origin = origin.tb_next
    culprit = inner or type(judge)
    return f"judge {culprit.__name__} of package {package_of(culprit)} raised {registry.one_line(error)}"


def package_of(kind: type) -> str:
    """Returns "distribution version" of a class's top-level package, or its module where none is installed."""
    top = kind.__module__.partition(".")[0]
    for name in importlib.metadata.packages_distributions().get(top, []):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    for found in registry.components():  # an editable install lists no packages, but it offers components
        if found.value.partition(":")[0].partition(".")[0] == top:
            return f"{found.distribution} {found.version}"
    return f"{kind.__module__} (not an installed package)"


def unscored(verdicts: Sequence[Verdict], stages: Sequence[str]) -> list[bool]:
    """Returns, for each verdict, whether some stage has no total."""
    return [any(v.total(stage) is None for stage in stages) for v in verdicts]


def _stop_if_blind(recipe: Recipe, step: int, verdicts: Sequence[Verdict]) -> None:
    blind = unscored(verdicts, recipe.trained)
    share = sum(blind) / max(len(blind), 1)
    if share > recipe.max_unscored:
        notes = Counter(
            f"{name}: {score.note}" for v in verdicts for name, score in v.scores.items() if score.value is None
        )
        why = "; ".join(f"{note} ({times}x)" for note, times in notes.most_common(3)) or "no reason given"
        raise JudgeError(
            f"step {step}: {share:.0%} of trajectories are unscored,"
            f" more than max_unscored={recipe.max_unscored:g}: {why}"
        )


@contextlib.contextmanager
def _sampling_weights(recipe: Recipe, weights: Mapping[Trainable, Weights]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for trainable, copies in weights.items():
            for name in {recipe.sample_with[s] for s in trainable.stages if s in recipe.sample_with}:
                stack.enter_context(copies.use(name))
        yield
