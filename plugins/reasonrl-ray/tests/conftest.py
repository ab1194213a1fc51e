"""Judges for actors, sent by value: an actor's process cannot import a test module."""

import os
import sys
import time

import pytest
from attrs import frozen

from reasonrl import ConfigError, Judge, PointwiseJudge, Score, Term, Verdict


class TwoWordsError(Exception):
    """Cannot be unpickled: its constructor wants more than its message."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


@frozen
class Odd(PointwiseJudge):
    """Does what the prompt's text says, else returns the length of the reasoning and the process's id as the cost."""

    folder: str = ""
    needs = frozenset({"image"})
    name = "odd"

    def score(self, trajectory):
        text = trajectory.prompt.text
        if text == "die":
            os._exit(1)
        if text == "die once" and not os.path.exists(f"{self.folder}/died"):
            with open(f"{self.folder}/died", "w"):
                os._exit(1)
        if text in ("slow", "hang"):
            time.sleep(100 if text == "hang" else 1)
        if text == "misconfigured":
            raise ConfigError("judge.url is 'x': give a URL")
        if text == "broken":
            raise ZeroDivisionError("a bug\nof the judge")
        if text == "unpicklable":
            raise TwoWordsError("out of", "memory")
        if text == "unscored":
            return Score(None, "refused: no comment", {"calls": 2.0})
        return Score(len(trajectory.reasoning or "") / 100, "", {"calls": 1.0, "pid": float(os.getpid())})


@frozen
class Whole(Judge):
    """The share of its group that a trajectory arrived with: 1 where the group of four is whole; on two stages."""

    stages = frozenset({"reasoning", "image"})

    def judge(self, trajectories):
        ids = [trajectory.prompt.id for trajectory in trajectories]
        terms = [(Term("whole", ids.count(i) / 4, 0.5),) for i in ids]
        return [Verdict({"reasoning": each, "image": each}, {"whole": Score(each[0].value)}) for each in terms]


@frozen
class Unbuildable(PointwiseJudge):
    """Cannot be built in another process."""

    home: int = os.getpid()

    def __setstate__(self, state):
        if os.getpid() != state["home"]:
            raise RuntimeError("no such module here")
        object.__setattr__(self, "home", state["home"])

    def score(self, trajectory):
        return 1.0


@pytest.fixture(scope="session")
def judges_by_value():
    """Ray pickles the classes of this module whole."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="session")
def odd_judge(judges_by_value):
    return Odd()


@pytest.fixture(scope="session")
def whole_judge(judges_by_value):
    return Whole()


@pytest.fixture(scope="session")
def unbuildable_judge(judges_by_value):
    return Unbuildable()
