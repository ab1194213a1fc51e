"""A run: the loop with a directory around it. Progress, journal, checkpoints, resume, Ctrl-C, evaluation."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import define, field

from reasonrl import __version__, checkpoint, hooks
from reasonrl.batch import Row
from reasonrl.config import from_record, to_record
from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.eval import Answer, evaluate
from reasonrl.interfaces import Trainable
from reasonrl.journal import Journal, summary
from reasonrl.loop import Learner, train
from reasonrl.progress import Progress
from reasonrl.recipe import Recipe, load_prompts
from reasonrl.report import write_report
from reasonrl.rollout import Experience, rollouts
from reasonrl.types import Prompt, Trajectory, Verdict
from reasonrl.weights import Weights

ROOTS = {"recipe": Recipe}
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
) -> Path:
    """Trains a recipe into a directory, evaluates before and after, and returns the report's path.

    `experience(start)` replaces rollouts, e.g. by demonstrations. `resume` goes on from the newest checkpoint: final
    weights are bit-identical to an uninterrupted run's, on the same machine and versions.
    What the recipe changed since is said, and written to run.json.
    """
    directory = Path(directory)
    prompts = recipe.read() if experience is None else ()
    tests = {split: _checked(recipe, source) for split, source in recipe.tests.items()}
    _prepare(directory, recipe, resume=resume, command=command)
    session = _Session(recipe, directory, Learner.of(recipe), Progress(recipe.steps, quiet=quiet), tests)
    if resume:
        session.restore()
    source = rollouts(recipe, prompts, start=session.finished) if experience is None else experience(session.finished)
    return session.run(source)


@define(eq=False)
class _Session:
    """One process's part of a run."""

    recipe: Recipe
    directory: Path
    learner: Learner
    progress: Progress
    tests: dict[str, tuple[Prompt, ...]]
    finished: int = 0
    stop: bool = False
    _torn: bool = False
    """The weights are between two steps: saving them would break resume."""
    _line: dict[str, Any] = field(factory=dict)
    _since: float = 0.0

    @property
    def journal(self) -> Journal:
        return Journal(self.directory)

    def restore(self) -> None:
        found = checkpoint.saved(self.directory / "checkpoints")
        if not found:
            raise CheckpointError(f"{self.directory}/checkpoints holds no checkpoint: start again without --resume")
        self.finished = checkpoint.restore(found[-1], weights=self.learner.weights, optimizer=self.learner.optimizer)
        if self.finished > self.recipe.steps:
            raise ConfigError(
                f"{self.directory} has finished {self.finished} steps, more than steps={self.recipe.steps}"
            )
        self.journal.rewind(self.finished)
        self.record_changes()

    def record_changes(self) -> None:
        """Says and writes down in which fields the recipe is not the one that the run had."""
        changes = _changes(_read_json(self.directory / "recipe.json"), to_record(self.recipe, roots=ROOTS))
        if not changes:
            return
        for change in changes:
            self.progress.say(f"from step {self.finished} on, {change}")
        facts = _read_json(self.directory / "run.json")
        facts.setdefault("changed", {}).setdefault(str(self.finished), []).extend(changes)
        _write_json(self.directory / "run.json", facts)
        _write_json(self.directory / "recipe.json", to_record(self.recipe, roots=ROOTS))

    def run(self, experience: Experience) -> Path:
        """Evaluates, trains, evaluates, reports; whatever stops it, finished steps are saved."""
        hooks.call("run_start", recipe=self.recipe, directory=self.directory)
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
                    train(self.recipe, experience, learner=self.learner, observe=self.observe)
            self.save()
            self.evaluate(self.recipe.steps)
            with checkpoint.atomic_folder(self.directory / "model") as model:
                self.recipe.policy.save(model)
            return write_report(self.directory)
        except KeyboardInterrupt as caught:
            error = caught
            raise
        except Exception as caught:
            error = caught
            self._save_after(caught)
            raise
        finally:
            hooks.call("run_end", step=self.finished, error=error)

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
            found = evaluate(
                self.recipe.policy,
                self.recipe.renderer,
                judge,
                prompts,
                split=split,
                timeout_s=self.recipe.judge_timeout_s,
            )
            answers += self.progress.watch(found, f"evaluating {split}", total=len(prompts))
        self.journal.rewind_evaluation(step)
        self.journal.evaluation(step, ((a.record(), a.trajectory) for a in answers))

    def save(self) -> None:
        """Writes a checkpoint of the finished steps, unless it is there."""
        folder = self.directory / "checkpoints"
        if not (folder / f"step-{self.finished:06d}" / "state.json").is_file():
            checkpoint.save(
                folder,
                self.finished,
                weights=self.learner.weights,
                optimizer=self.learner.optimizer,
                recipe=json.loads((self.directory / "recipe.json").read_text()),
                keep=self.recipe.keep,
            )

    def _rollout_end(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        verdicts: Sequence[Verdict],
        rows: Sequence[Row],
    ) -> None:
        hooks.call("rollout_end", step=step, trajectories=trajectories, verdicts=verdicts)
        self._line = dict(summary(rows, trajectories, verdicts, self.recipe.stages, self.recipe.trained))
        self._line["num_tokens"] = sum(len(s.actions) for t in trajectories for s in t.segments.values())
        if self.recipe.judge is not None and (step % self.recipe.show_every == 0 or step + 1 == self.recipe.steps):
            # One trajectory a prompt, the first of its group.
            shown = list(range(0, len(trajectories), self.recipe.group_size))[:NUM_SHOWN]
            last = self.recipe.trained[-1]
            self.journal.samples(step, [trajectories[i] for i in shown], [verdicts[i] for i in shown], last)

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
        self.journal.metrics(line)
        self.finished, self._torn = step + 1, False
        self.progress.advance(line)
        hooks.call("step_end", step=step, metrics=line)
        if self.stop or self.finished % self.recipe.save_every == 0:
            self.save()
        if self.stop:
            again = f"reasonrl train --resume {shlex.quote(str(self.directory))}"
            raise Interrupted(f"stopped after step {step}, saved. Go on with: {again}")

    def _save_after(self, error: Exception) -> None:
        if self._torn or isinstance(error, CheckpointError):
            return  # half a step, or the disk has refused already
        try:
            self.save()
        except CheckpointError as second:
            error.add_note(str(second))

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


def _checked(recipe: Recipe, source: str) -> tuple[Prompt, ...]:
    prompts = load_prompts(source)
    recipe.policy.check(prompts)
    return prompts


def _prepare(directory: Path, recipe: Recipe, *, resume: bool, command: str) -> None:
    if resume:
        if not (directory / "recipe.json").is_file():
            raise ConfigError(f"{directory} holds no run to resume: give the folder that `reasonrl train` printed")
        return
    try:
        if directory.exists() and any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty: use --resume to go on with it, or --out for another folder")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}") from error
    _write_json(directory / "recipe.json", to_record(recipe, roots=ROOTS))
    _write_json(directory / "run.json", about(command))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    now = json.loads(json.dumps(now))
    shown = [{name: json.dumps(value) for name, value in record.items()} for record in (before, now)]
    return [
        f"{name} is {shown[1].get(name, 'the default')}, was {shown[0].get(name, 'the default')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _write_json(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file whole or not at all."""
    try:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1))
        new.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def about(command: str) -> dict[str, str]:
    """Returns what ran where: versions, machine, command."""
    return {
        "reasonrl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
    }


def read_recipe(path: Path) -> Recipe:
    """Returns the recipe that a recipe.json describes; it may construct registered names only."""
    recipe = from_record(_read_json(path), roots=ROOTS)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} describes a {type(recipe).__name__}, not a recipe")
    return recipe


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, not a recipe's record")
    return record


def counted(trainable: Trainable, weights: Weights) -> str:
    """Returns how many parameters learn, of how many."""
    learns = sum(p.numel() for p in weights.live)
    every = sum(p.numel() for p in trainable.module.parameters())
    return f"{type(trainable).__name__}: {learns:,} of {every:,} parameters learn"
