from collections.abc import Iterator

from reasonrl.hooks import hookimpl


@hookimpl(wrapper=True)
def step_end(step: int) -> Iterator[None]:
    yield
