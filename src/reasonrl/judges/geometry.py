"""Relations and counts of a prompt, checked by calculation: of planned boxes, or of boxes located in the image.

PlanGeometry()                 # R_spa at no cost
ImageGeometry(Detector(...))   # the same of the picture
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import final

from attrs import field, frozen, validators

from reasonrl.interfaces import Judge, PointwiseJudge
from reasonrl.judges.grounding import Found, Locator, Sight, as_locator, located
from reasonrl.judges.prompt_reading import Asked, name_words, read_prompt
from reasonrl.judges.vlm import total_cost
from reasonrl.plan import Box, PlannedObject
from reasonrl.relations import Relation, holds
from reasonrl.types import Score, Trajectory, Verdict

FLOOR = 0.1
"""GoT-R1's R_spa is a mark from 1 to 10: contradictory layouts get a tenth, not nothing."""
SAME = 0.8
"""IoU from which two boxes of one name are one object: stacking boxes does not count to three."""


def boxes_named(name: str, objects: Sequence[PlannedObject]) -> list[Box]:
    """Returns the boxes of the objects so called: of its head noun, with all of its adjectives where any has them."""
    wanted = name_words(name)
    if not wanted:
        return []
    alike = [(set(name_words(o.name)), o.box) for o in objects if o.box and name_words(o.name)[-1:] == wanted[-1:]]
    exact = [box for words, box in alike if set(wanted) <= words]
    return _apart(exact or [box for _, box in alike])


def _apart(boxes: Sequence[Box]) -> list[Box]:
    """Returns boxes without those that repeat an earlier one."""
    kept: list[Box] = []
    for box in boxes:
        if all(box.iou(other) < SAME for other in kept):
            kept.append(box)
    return kept


# ---- scores ----


def score_boxes(asked: Asked, boxes_of: Callable[[str], Sequence[Box]]) -> float:
    """Returns 0.1 + 0.9 × the mean over counts and relations, in [0.1, 1]; `boxes_of` gives the boxes of a name."""
    counts = [count_value(number, len(boxes_of(name))) for name, number in asked.counts]
    relations = [relation_value(relation, boxes_of(a), boxes_of(b)) for a, relation, b in asked.relations]
    values = [*counts, *relations]
    return FLOOR + (1 - FLOOR) * sum(values) / len(values)


def count_value(asked: int, found: int) -> float:
    """Returns 1 for the exact number, else half the ratio of the smaller to the larger: it falls with the distance.

    Half for being near and half for being right, as T2I-CompBench weighs numeracy.
    """
    return 1.0 if asked == found else 0.5 * min(asked, found) / max(asked, found)


def relation_value(relation: Relation, first: Sequence[Box], second: Sequence[Box]) -> float:
    """Returns the fraction that `holds`: of all pairs, so that copies on every side do not make it true.

    "next to" and "inside" ask of each that it holds for some other. 0 where either is missing.
    """
    if not first or not second:
        return 0.0
    if list(first) == list(second):  # "a dog left of a dog": either may be the left one
        pairs = list(combinations(first, 2))
        return _mean([holds(relation, a, b) or holds(relation, b, a) for a, b in pairs]) if pairs else 0.0
    if relation in (Relation.NEXT_TO, Relation.INSIDE):
        each = _mean([any(holds(relation, a, b) for b in second) for a in first])
        if relation is Relation.INSIDE:
            return each
        return (each + _mean([any(holds(relation, b, a) for a in first) for b in second])) / 2
    return _mean([holds(relation, a, b) for a, b in product(first, second)])


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


_WITHOUT = field(
    default=None, validator=validators.optional(validators.and_(validators.ge(0.0), validators.le(1.0))), kw_only=True
)
NOTHING_ASKED = "no relation or count: the prompt names none that boxes could show"


@final
@frozen
class PlanGeometry(PointwiseJudge):
    """R_spa by calculation, in [0.1, 1]: the prompt's relations and counts against the planned boxes; no boxes are 0.

    Free and exact, for prompts that `read_prompt` reads; blind to everything else: objects that nobody asked for cost
    nothing here, which is `Semantic`'s matter.
    """

    without: float | None = _WITHOUT
    """The score for a prompt that names neither a relation nor a count; None abstains."""

    def score(self, trajectory: Trajectory) -> Score:
        """Returns 0.1 + 0.9 × the mean over counts and relations."""
        plan = trajectory.plan
        placed = [each for each in plan.objects if each.box] if plan else []
        if not placed:
            return Score(0.0, "no planned boxes")
        asked = read_prompt(trajectory.prompt.text)
        if not asked.names:
            return Score(self.without, NOTHING_ASKED)
        return Score(score_boxes(asked, lambda name: boxes_named(name, placed)))


@final
@frozen
class ImageGeometry(Judge):
    """R_PI's relations and counts by calculation, in [0.1, 1], of what a locator finds in the image; nothing is 0.

    A name that could not be looked for leaves the trajectory unscored.
    """

    locator: Locator = field(converter=as_locator)
    """Who looks: a `Detector`, or a VLM, which is asked for boxes."""
    without: float | None = _WITHOUT
    """The score for a prompt that names neither a relation nor a count; None abstains."""

    @property
    def needs(self) -> frozenset[str]:
        """The image."""
        return frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Looks for all names in all images at once, and scores each trajectory."""
        sights = [
            [Sight(t.image, name) for name in read_prompt(t.prompt.text).names] if t.image else [] for t in trajectories
        ]
        answers = iter(located(self.locator, [sight for each in sights for sight in each]))
        found = [{sight.name: next(answers) for sight in each} for each in sights]
        return [Verdict.of("ImageGeometry", self._score(t, f)) for t, f in zip(trajectories, found, strict=True)]

    def _score(self, trajectory: Trajectory, found: Mapping[str, Found]) -> Score:
        if trajectory.image is None:
            return Score(0.0, "no image")
        asked = read_prompt(trajectory.prompt.text)
        if not asked.names:
            return Score(self.without, NOTHING_ASKED)
        cost = total_cost([each.cost for each in found.values()])
        if blind := [each.note for each in found.values() if each.boxes is None]:
            return Score(None, blind[0], cost)
        boxes = {name: _apart(each.boxes or ()) for name, each in found.items()}
        if not any(boxes.values()):
            return Score(0.0, "nothing located", cost)
        return Score(score_boxes(asked, boxes.__getitem__), cost=cost)
