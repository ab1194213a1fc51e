"""A run: the loop with a directory around it. Progress, journal, checkpoints, resume, Ctrl-C, evaluation."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field, has

from reasonrl import checkpoint, hooks
from reasonrl.batch import Row
from reasonrl.config import to_record
from reasonrl.distributed import World, best_device, launched, part_of
from reasonrl.errors import CheckpointError, ConfigError, RankError
from reasonrl.eval import Answer, evaluate
from reasonrl.fields import fields_of
from reasonrl.folder import ROOTS, begin, changes, check_folder, read_json, write_json
from reasonrl.interfaces import Trainable
from reasonrl.journal import Journal, Seen, summary
from reasonrl.loop import Learner, train
from reasonrl.progress import Progress
from reasonrl.recipe import Recipe, load_prompts
from reasonrl.report import write_report
from reasonrl.rollout import Experience, JudgeTime, rollouts
from reasonrl.types import Prompt, Trajectory, Verdict
from reasonrl.weights import Weights, averaged

NUM_SHOWN = 8


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and saved."""


def run(
    recipe: Recipe,
    directory: str | Path,
    *,
    resume: bool = False,
    experience: Callable[[int], Experience] | None = None,
    quiet: bool = False,
    command: str = "",
    world: World | None = None,
) -> Path:
    """Trains a recipe into a directory, evaluates before and after, and returns the report's path.

    `experience(start)` replaces rollouts, e.g. by demonstrations. `resume` goes on from the newest checkpoint: final
    weights are bit-identical to an uninterrupted run's, on the same machine and versions.
    What the recipe changed since is said, and written to run.json.

    At the end `directory/model` is the policy's, and `directory/renderer` the renderer's, where it was trained. With
    `recipe.average`, the average is what evaluations draw with, and what these folders hold; checkpoints hold both.

    Started by `accelerate launch` or torchrun, the processes share one run, and the first writes it. Modules go to
    the process's GPU where there is one.
    """
    world = world or launched(best_device())
    directory = Path(world.gather([str(directory)])[0])
    with world.agreed():
        prompts = recipe.read() if experience is None else ()
        tests = {split: _checked(recipe, source) for split, source in recipe.tests.items()}
        if world.rank == 0:
            check_folder(directory, resume=resume)
    progress = Progress(recipe.steps, quiet=quiet or world.rank > 0)
    session = _Session(recipe, directory, Learner.of(recipe, world), progress, tests, world)
    with world.agreed():
        _check_shared(recipe)
        said = recipe.policy.foretell(prompts, group_size=recipe.group_size) if prompts else []
        if world.rank == 0 and not resume:  # what is refused above leaves no folder behind
            begin(directory, recipe, command=command, world=world)
    if resume:
        found = checkpoint.saved(directory / "checkpoints") if world.rank == 0 else []
        found = world.gather(found)  # the first's word: on another machine a folder's list may be older
        with world.agreed():
            session.restore(found)
    if experience is None:
        drawn = rollouts(recipe, prompts, start=session.finished, world=world, clock=session.clock)
        return session.run(drawn, said)
    return session.run(experience(session.finished), said)


@define(eq=False)
class _Session:
    """One process's part of a run."""

    recipe: Recipe
    directory: Path
    learner: Learner
    progress: Progress
    tests: dict[str, tuple[Prompt, ...]]
    world: World
    clock: JudgeTime = field(factory=JudgeTime)
    finished: int = 0
    stop: bool = False
    _torn: bool = False
    """The weights are between two steps: saving them would break resume."""
    _line: dict[str, Any] = field(factory=dict)
    _since: float = 0.0

    @property
    def journal(self) -> Journal:
        return Journal(self.directory)

    @property
    def writes(self) -> bool:
        """Whether this process writes what the run writes, and calls its observers."""
        return self.world.rank == 0

    @property
    def results(self) -> dict[str, Trainable]:
        """What the run leaves, by its folder: the policy, and a renderer that was trained."""
        found: dict[str, Trainable] = {"model": self.recipe.policy}
        if isinstance(self.recipe.renderer, Trainable) and self.recipe.renderer in self.recipe.learning:
            found["renderer"] = self.recipe.renderer
        return found

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside, modules are whole on every process, and hold their averages where the recipe keeps some."""
        kept = self.learner.weights.values() if self.recipe.average is not None else ()
        with averaged(kept), self.world.whole(self.recipe.trainables):
            yield

    def restore(self, found: Sequence[Path]) -> None:
        if not found:
            raise CheckpointError(f"{self.directory}/checkpoints holds no checkpoint: start again without --resume")
        self.finished = checkpoint.restore(found[-1], weights=self.learner.weights, optimizer=self.learner.optimizer)
        if self.finished > self.recipe.steps:
            raise ConfigError(
                f"{self.directory} has finished {self.finished} steps, more than steps={self.recipe.steps}"
            )
        if self.writes:
            self.journal.rewind(self.finished)
            self.record_changes()

    def record_changes(self) -> None:
        """Says and writes down in which fields the recipe is not the one that the run had."""
        found = changes(read_json(self.directory / "recipe.json"), to_record(self.recipe, roots=ROOTS))
        if not found:
            return
        for change in found:
            self.progress.say(f"from step {self.finished} on, {change}")
        facts = read_json(self.directory / "run.json")
        facts.setdefault("changed", {}).setdefault(str(self.finished), []).extend(found)
        write_json(self.directory / "run.json", facts)
        write_json(self.directory / "recipe.json", to_record(self.recipe, roots=ROOTS))

    def run(self, experience: Experience, said: Sequence[str]) -> Path:
        """Evaluates, trains, evaluates, reports; whatever stops it, finished steps are saved."""
        with self.world.agreed():
            self._tell("run_start", recipe=self.recipe, directory=self.directory)
        for line in said:
            self.progress.say(line)
        for trainable, weights in self.learner.weights.items():
            self.progress.say(counted(trainable, weights))
        error: BaseException | None = None
        try:
            with self._interruptible():
                if self.finished == 0:
                    self.evaluate(0)
                    self.save()
                with self.progress:
                    self._since = time.perf_counter()
                    train(self.recipe, experience, learner=self.learner, world=self.world, observe=self.observe)
            self.save()
            self.evaluate(self.recipe.steps)
            with self._whole(), self.world.agreed():
                if self.writes:
                    for name, trainable in self.results.items():
                        with checkpoint.atomic_folder(self.directory / name) as folder:
                            trainable.save(folder)
                    write_report(self.directory)
            return self.directory / "report.html"
        except KeyboardInterrupt as caught:
            error = caught
            raise
        except Exception as caught:
            error = caught
            self._save_after(caught)
            raise
        finally:
            self._tell("run_end", step=self.finished, error=error)

    def observe(self, event: str, **facts: Any) -> None:
        """Hears the loop's events."""
        getattr(self, f"_{event}")(**facts)

    def evaluate(self, step: int) -> None:
        """Judges one sample of each test prompt, and writes it down."""
        judge = self.recipe.test_judge or self.recipe.judge
        if not self.tests or judge is None:
            return
        answers: list[Answer] = []
        for split, prompts in self.tests.items():
            mine = part_of(prompts, self.world)
            found = evaluate(
                self.recipe.policy,
                self.recipe.test_renderer or self.recipe.renderer,
                judge,
                mine,
                split=split,
                timeout_s=self.recipe.judge_timeout_s,
            )
            with self._whole(), self.world.agreed():
                got = list(self.progress.watch(found, f"evaluating {split}", total=len(mine)))
            answers += self.world.gather([evolve(a, trajectory=_light(a.trajectory)) for a in got])
        with self.world.agreed():
            if self.writes:
                self.journal.rewind_evaluation(step)
                self.journal.evaluation(step, ((a.record(), a.trajectory) for a in answers))

    def save(self) -> None:
        """Writes a checkpoint of the finished steps, unless it is there."""
        folder = self.directory / "checkpoints"
        missing = not (folder / f"step-{self.finished:06d}" / "state.json").is_file()
        if self.world.gather([missing])[0]:
            checkpoint.save(
                folder,
                self.finished,
                weights=self.learner.weights,
                optimizer=self.learner.optimizer,
                recipe=to_record(self.recipe, roots=ROOTS),
                keep=self.recipe.keep,
                world=self.world,
            )

    def _rollout_end(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        verdicts: Sequence[Verdict],
        rows: Sequence[Row],
    ) -> None:
        with self.world.agreed():
            self._tell("rollout_end", step=step, trajectories=trajectories, verdicts=verdicts)
        seen = self.world.gather([Seen.of(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)])
        self._line = dict(summary(seen, self.recipe.stages, self.recipe.trained))
        if self.clock.hidden_frac is not None:
            self._line |= {"judge_s": self.clock.busy_s, "judge_hidden_frac": self.clock.hidden_frac}
        self._line["num_tokens"] = sum(sum(one.lengths.values()) for one in seen)
        if self.recipe.judge is not None and (step % self.recipe.show_every == 0 or step + 1 == self.recipe.steps):
            self._show(step, trajectories, verdicts)

    def _show(self, step: int, trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> None:
        """Writes one trajectory a prompt, the first of its group."""
        ids = [t.prompt.id for t in trajectories]
        firsts = [ids.index(one) for one in dict.fromkeys(ids)]  # a renderer may have branched: groups differ in size
        before = sum(self.world.gather([len(firsts)])[: self.world.rank])
        mine = firsts[: max(0, NUM_SHOWN - before)]
        shown = self.world.gather([(_light(trajectories[i]), verdicts[i]) for i in mine])
        with self.world.agreed():
            if self.writes:
                self.journal.samples(step, [t for t, _ in shown], [v for _, v in shown], self.recipe.trained[-1])

    def _backward_end(self, step: int) -> None:
        self._torn = True

    def _update_end(self, step: int, grad_norm: torch.Tensor, metrics: dict[str, torch.Tensor], skipped: bool) -> None:
        self._line |= {name: float(value) for name, value in metrics.items()}
        self._line |= {"grad_norm": float(grad_norm), "skipped": float(skipped)}

    def _step_end(self, step: int, learner: Learner) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        num_tokens = self._line.pop("num_tokens")
        line = {"step": step, "seconds": seconds, "tokens_per_s": num_tokens / seconds}
        line |= {"learning_rate": self.recipe.rate(step), **self._line}
        with self.world.agreed():
            if self.writes:
                self.journal.metrics(line)
        self.finished, self._torn = step + 1, False
        self.progress.advance(line)
        with self.world.agreed():
            self._tell("step_end", step=step, metrics=line)
        self.stop = bool(self.world.max(int(self.stop)))  # whichever rank heard Ctrl-C, all stop here
        if self.stop or self.finished % self.recipe.save_every == 0:
            self.save()
        if self.stop:
            again = f"reasonrl train --resume {shlex.quote(str(self.directory))}"
            raise Interrupted(f"stopped after step {step}, saved. Go on with: {again}")

    def _save_after(self, error: Exception) -> None:
        refused = self.world.gather([isinstance(error.__cause__, CheckpointError)]) if self._agreed(error) else []
        if self._torn or isinstance(error, CheckpointError) or any(refused):
            return  # half a step, or the disk has refused already
        if self.world.size > 1 and not self._agreed(error):
            return  # the others are elsewhere and would not come to save; the launcher ends them
        try:
            self.save()
        except (CheckpointError, RankError) as second:
            error.add_note(str(second))

    def _agreed(self, error: Exception) -> bool:
        return self.world.size > 1 and isinstance(error, RankError)

    def _tell(self, hook: str, **facts: Any) -> None:
        if self.writes:
            hooks.call(hook, **facts)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C lets the step finish; the second one stops at once."""

        def ask(number: int, frame: object) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            self.progress.say("finishing this step, then saving; Ctrl-C again stops at once")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: signals are someone else's
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _light(trajectory: Trajectory) -> Trajectory:
    """Returns what is written of a trajectory, to send."""
    return evolve(trajectory, segments={}, artifacts={})


def _checked(recipe: Recipe, source: str) -> tuple[Prompt, ...]:
    prompts = load_prompts(source)
    recipe.policy.check(prompts)
    return prompts


def _check_shared(recipe: Recipe) -> None:
    test, renderer = recipe.test_renderer, recipe.renderer
    if not isinstance(test, Trainable) or any(test.module is t.module for t in recipe.trainables):
        return
    advice, kind = "make it with attrs.evolve(renderer, ...)", type(test)
    if kind is type(renderer) and has(kind):
        apart = [key for key, a in fields_of(kind).items() if getattr(test, a.name) != getattr(renderer, a.name)]
        advice = f"it differs from renderer in {', '.join(apart)}: set alike what decides the weights"
    raise ConfigError(
        f"test_renderer {kind.__name__} has weights of its own, so tests would not see what is trained; {advice}"
    )


def counted(trainable: Trainable, weights: Weights) -> str:
    """Returns how many parameters learn, of how many."""
    learns = sum(p.numel() for p in weights.live)
    every = sum(p.numel() for p in trainable.module.parameters())
    return f"{type(trainable).__name__}: {learns:,} of {every:,} parameters learn"
