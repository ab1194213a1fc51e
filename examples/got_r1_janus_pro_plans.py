"""`got_r1_janus_pro.py` without a judge model: the reward is calculated from the plan, so the reasoning alone learns.

    reasonrl train examples/got_r1_janus_pro_plans.py --prompts t2i-compbench/spatial_train.txt

For T2I-CompBench's spatial and numeracy prompts: can the plan be drawn by, and do its boxes show the relations and the
counts that the prompt asks for? It costs nothing, it is exact, and it says nothing of the picture.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from attrs import frozen

import reasonrl as rl
from reasonrl.judges.geometry import PlanGeometry
from reasonrl.types import Stop

spec = importlib.util.spec_from_file_location("got_r1_janus_pro", Path(__file__).with_name("got_r1_janus_pro.py"))
assert spec is not None
assert spec.loader is not None
whole = importlib.util.module_from_spec(spec)
spec.loader.exec_module(whole)

# All 700 are read by PlanGeometry.
PROMPTS = "t2i-compbench/spatial_train.txt"


@frozen
class WellFormed(rl.PointwiseJudge):
    """Whether the plan can be drawn by: the fraction of its objects that have a readable box, in [0, 1].

    0 where nothing is planned, and where the plan had to be cut off.
    """

    def score(self, trajectory: rl.Trajectory) -> rl.Score:
        """Scores one plan."""
        if trajectory.stop is not Stop.END:
            return rl.Score(0.0, "the plan did not end by itself")
        objects = rl.Plan.parse(trajectory.reasoning or "").objects
        boxed = sum(each.box is not None for each in objects)
        return rl.Score(boxed / len(objects) if objects else 0.0)


JUDGE = (WellFormed() * PlanGeometry()).on("reasoning")
recipe = whole.recipe_for(PROMPTS, whole.CHECKPOINT, JUDGE)

if __name__ == "__main__":
    rl.run(recipe, "runs/got_r1_janus_pro_plans")
