"""Progress: the bar of a run, on the terminal's error stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

T = TypeVar("T")


class Progress:
    """Shows step, reward by component, tokens a second and time left; `quiet` shows nothing."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.bar = Bar(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            # A log file gets one line a step from `advance` instead of a bar that cannot redraw.
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("steps", total=steps, facts="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self, line: Mapping[str, float | int | None]) -> None:
        """Shows a finished step's metrics."""
        text = describe(line)
        self.bar.update(self.task, completed=int(line["step"] or 0) + 1, facts=text)
        if not self.console.is_terminal:
            self.console.print(f"step {line['step']}: {text}", highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def watch(self, items: Iterable[T], what: str, *, total: int) -> Iterator[T]:
        """Yields the items under a bar of their own."""
        columns = (
            TextColumn(what, markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
        )
        disabled = self.console.quiet or not self.console.is_terminal
        with Bar(*columns, console=self.console, transient=True, disable=disabled) as bar:
            yield from bar.track(items, total=total)


def describe(line: Mapping[str, float | int | None]) -> str:
    """Returns "reward 0.41  SceneSpatial 0.66 ...  5100 tok/s", short names, unknown values as a dash."""
    shown = {"reward": "reward"} | {k: k.removeprefix("score/") for k in line if k.startswith("score/")}
    parts = [f"{name} {_number(line.get(key))}" for key, name in shown.items() if key in line]
    losses = [f"{k} {_number(v)}" for k, v in line.items() if k.endswith("/nats")]
    return "  ".join([*parts, *losses, f"{line['tokens_per_s']:.0f} tok/s"])


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.2f}"
