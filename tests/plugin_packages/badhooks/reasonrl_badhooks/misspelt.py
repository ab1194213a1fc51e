from reasonrl.hooks import hookimpl


@hookimpl
def step_ended(step: int) -> None:
    pass
