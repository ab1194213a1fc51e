"""R_spa, prompt to layout: are the planned boxes where the prompt wants them? Judged as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import field, frozen, validators

from reasonrl.interfaces import Judge
from reasonrl.judges.asking import SCORINGS, Scoring, answer_for, bands, check_scoring, judged
from reasonrl.judges.layout import draw_plan
from reasonrl.judges.vlm import GUARD, VLM, Question, quoted
from reasonrl.types import Score, Trajectory, Verdict

VERSION = "1"
SIDE = 448
"""Pixels of the canvas: a multiple of 28 and of 32, which neither Qwen2.5-VL nor Qwen3-VL resizes."""
SYSTEM = f"You check whether the layout sketched for a picture serves the request that it was made for. {GUARD}"
CRITERIA = """The picture is a sketch of a layout: every outlined rectangle is where an object is to be drawn, and the
label at its upper left corner is that object's name. Colours of outlines mean nothing.
Look only at which objects there are, how many, and where: left, right, above, below, beside, inside, in front, sizes.
Read the relations strictly: "left of" means that the middle of one is clearly further left than that of the other; "on
top of" means directly above, and touching or nearly so; "next to" means close beside, without lying in each other."""
BANDS = {
    "marks": "Mark it: 9 = every object is there and placed as asked; 6 = placed ambiguously; 3 = one relation is"
    " contradicted or one object missing; 1 = the layout contradicts the request.",
    "json": "Mark it: 8 to 10 = every object is there and placed as asked; 5 to 7 = placed ambiguously; 1 to 4 = a"
    " relation is contradicted or an object missing.",
    "yes": "Does the layout have every object that the request asks for, as many of them, placed as it asks?",
}


@final
@frozen
class Spatial(Judge):
    """R_spa of GoT-R1 (arXiv 2505.17022 section 3.3), in [0.1, 1]: a VLM looks at the planned boxes on a blank canvas.

    The published mark is 1 to 10, so a contradicted layout is 0.1; a plan without any box is 0. Of the plan's text the
    judge sees the objects' names alone. `PlanGeometry` answers the same by calculation where the prompt allows it.
    """

    vlm: VLM = field()
    scoring: Scoring = field(default="auto", validator=validators.in_(SCORINGS))

    def __attrs_post_init__(self) -> None:
        check_scoring(self, self.scoring, self.vlm)

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Asks about each layout."""
        return judged("Spatial", trajectories, self.vlm, self.question)

    def question(self, trajectory: Trajectory) -> Question | Score:
        """Returns the question about one trajectory, or its score where there is nothing to ask."""
        plan = trajectory.plan
        if plan is None or not any(each.box for each in plan.objects):
            return Score(0.0, "no planned boxes")
        answer = answer_for(self.scoring, self.vlm, low=1, thoughts=("reasoning",))
        text = "\n\n".join([CRITERIA, quoted("request", trajectory.prompt.text), bands(BANDS, answer)])
        return Question(SYSTEM, text, (draw_plan(plan, size=SIDE),), answer=answer, version=VERSION)
