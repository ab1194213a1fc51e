"""An observer that fails during the run."""

from reasonrl.hooks import hookimpl

CALLS: list[int] = []
RAISES: list[type[BaseException]] = [OSError]


@hookimpl
def step_end(step: int) -> None:
    CALLS.append(step)
    raise RAISES[-1]("disk full")
