"""R_sem, prompt to reasoning: does the plan say what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import field, frozen, validators

from reasonrl.interfaces import Judge
from reasonrl.judges.asking import SCORINGS, Scoring, answer_for, bands, check_scoring, judged
from reasonrl.judges.vlm import GUARD, VLM, Question, quoted
from reasonrl.types import Score, Trajectory, Verdict

VERSION = "1"
SYSTEM = f"You check whether the plan for a picture serves the request that it was made for. {GUARD}"
CRITERIA = """Compare the plan with the request, by four criteria:
1. Complete: every object, attribute, number and relation of the request is in the plan.
2. Faithful: nothing in the plan contradicts the request, and no main object is made up.
3. Consistent: the plan does not contradict itself, and the scene could exist as described.
4. Clear: it can be drawn from; it is neither vague nor padded with words that describe nothing.
How long a plan is says nothing about how good it is."""
BANDS = {
    "marks": "Mark it: 9 = all four hold; 6 = a small detail is missing or vague; 3 = an object, number or relation is"
    " missing or wrong; 0 = it plans something else, or nothing.",
    "json": "Mark it: 8 to 10 = all four hold; 5 to 7 = small details are missing or vague; 1 to 4 = an object, number"
    " or relation is missing or wrong; 0 = it plans something else, or nothing.",
    "yes": "Does the plan contain everything that the request asks for, rightly, and nothing that contradicts it?",
}


@final
@frozen
class Semantic(Judge):
    """R_sem of GoT-R1 (arXiv 2505.17022 section 3.3), in [0, 1]: a VLM compares the prompt with the plan's words.

    The boxes are taken out of the text: where things go is `Spatial`'s matter. A plan without words is 0.
    """

    vlm: VLM = field()
    scoring: Scoring = field(default="auto", validator=validators.in_(SCORINGS))

    def __attrs_post_init__(self) -> None:
        check_scoring(self, self.scoring, self.vlm)

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Asks about each plan."""
        return judged("Semantic", trajectories, self.vlm, self.question)

    def question(self, trajectory: Trajectory) -> Question | Score:
        """Returns the question about one trajectory, or its score where there is nothing to ask."""
        plan = trajectory.plan
        if plan is None or not plan.prose:
            return Score(0.0, "no plan")
        answer = answer_for(self.scoring, self.vlm, low=0, thoughts=())
        text = "\n\n".join(
            [CRITERIA, quoted("request", trajectory.prompt.text), quoted("plan", plan.prose), bands(BANDS, answer)]
        )
        return Question(SYSTEM, text, answer=answer, version=VERSION)
