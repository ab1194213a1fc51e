"""R_PI, prompt to image: does the picture show what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import field, frozen, validators

from reasonrl.interfaces import Judge
from reasonrl.judges.asking import SCORINGS, Scoring, answer_for, bands, check_scoring, judged
from reasonrl.judges.vlm import GUARD, VLM, Question, quoted
from reasonrl.types import Score, Trajectory, Verdict

VERSION = "1"
SYSTEM = f"You check whether a picture shows exactly what was asked for: objects, attributes, numbers, places. {GUARD}"
CRITERIA = """Go through what is asked for, object by object: is it there, as many as asked, with the colour, shape and
texture asked, doing what is asked, where it is asked?
Read relations strictly: "left of" must be plain from left to right; "on top of" means directly above and touching;
"next to" means close beside; counts must be exact; an attribute counts only on its own object.
How beautiful the picture is does not matter."""
BANDS = {
    "marks": "Mark it: 9 = everything is right; 6 = a minor detail is off; 3 = an object, number, attribute or relation"
    " is wrong; 0 = little or nothing of what was asked for is there.",
    "json": "Mark it: 8 to 10 = everything is right; 5 to 7 = minor details are off; 0 to 4 = an object, number,"
    " attribute or relation is wrong or missing.",
    "yes": "Does the picture show everything that the request asks for, rightly?",
}


@final
@frozen
class PromptImage(Judge):
    """R_PI of GoT-R1 (arXiv 2505.17022 section 3.3), in [0, 1]: a VLM compares the prompt with the picture.

    Nothing that the policy wrote reaches this judge. No picture is 0, the policy's fault.
    """

    vlm: VLM = field()
    scoring: Scoring = field(default="auto", validator=validators.in_(SCORINGS))

    def __attrs_post_init__(self) -> None:
        check_scoring(self, self.scoring, self.vlm)

    @property
    def needs(self) -> frozenset[str]:
        """The image."""
        return frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Asks about each picture."""
        return judged("PromptImage", trajectories, self.vlm, self.question)

    def question(self, trajectory: Trajectory) -> Question | Score:
        """Returns the question about one trajectory, or its score where there is nothing to ask."""
        if trajectory.image is None:
            return Score(0.0, "no image")
        answer = answer_for(self.scoring, self.vlm, low=0, thoughts=("description", "caption", "reasoning"))
        text = "\n\n".join([CRITERIA, quoted("request", trajectory.prompt.text), bands(BANDS, answer)])
        return Question(SYSTEM, text, (trajectory.image,), answer=answer, version=VERSION)
