from typing import Any

from reasonrl.hooks import hookimpl

SEEN: list[Any] = []


@hookimpl
def step_end(step: int) -> None:
    SEEN.append(step)
