from reasonrl.hooks import hookimpl


@hookimpl
def step_end(stepp: int) -> None:
    pass
