from reasonrl.hooks import hookimpl


class Observer:
    @hookimpl
    def step_end(self, step: int) -> None:
        pass
