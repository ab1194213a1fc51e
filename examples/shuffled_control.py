"""The control of `got_r1_nano.py`: the same run with every reward given to another member of its group.

    reasonrl train examples/shuffled_control.py

Whatever accuracy gains here was not learned from the reward.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve, field, frozen

import reasonrl as rl


@frozen
class Shuffled(rl.Judge):
    """A judge whose verdicts are permuted within each group, by a seed and the group's own texts."""

    part: rl.Judge = field()
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        return self.part.stages

    def judge(self, trajectories: Sequence[rl.Trajectory]) -> list[rl.Verdict]:
        verdicts = list(self.part.judge(trajectories))
        groups: dict[str, list[int]] = {}
        for index, trajectory in enumerate(trajectories):
            groups.setdefault(trajectory.prompt.id, []).append(index)
        out = list(verdicts)
        for prompt_id, members in groups.items():
            given = list(members)
            texts = "".join(trajectories[i].reasoning or "" for i in members)
            random.Random(f"{self.seed}/{prompt_id}/{texts}").shuffle(given)
            for index, source in zip(members, given, strict=True):
                out[index] = verdicts[source]
        return out


spec = importlib.util.spec_from_file_location("got_r1_nano", Path(__file__).with_name("got_r1_nano.py"))
assert spec is not None
assert spec.loader is not None
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)
recipe = evolve(nano.recipe, judge=Shuffled(nano.recipe.judge))

if __name__ == "__main__":
    rl.run(recipe, "runs/shuffled_control")
