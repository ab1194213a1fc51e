def step_end(step: int) -> None:
    pass
