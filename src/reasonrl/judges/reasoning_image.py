"""R_RI, reasoning to image: is what was planned where it was planned?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, final

from attrs import evolve, field, frozen, validators

from reasonrl.errors import ConfigError
from reasonrl.interfaces import Judge
from reasonrl.judges.grounding import Found, Locator, Sight, as_locator, located
from reasonrl.judges.vlm import total_cost
from reasonrl.plan import CANVAS, Plan, PlannedObject, plain_name
from reasonrl.relations import match
from reasonrl.types import Score, Trajectory, Verdict

NAME = "ReasoningImage"


@final
@frozen
class ReasoningImage(Judge):
    """R_RI of GoT-R1 (arXiv 2505.17022 section 3.3), in [0, 1]: the mean over planned objects of IoU(planned, located).

    Each distinct name is looked for once, and boxes are matched by name, one to one, for the largest total IoU: a box
    serves one planned object, however often it was planned. No planned objects are 0, never 1, and so is a planned
    object without a box: leaving out the boxes of what is hard does not pay. (It would pay to leave out the object
    itself, or to call it "thing": that is `Semantic`'s matter.) A name that could not be looked for leaves the whole
    trajectory unscored: a mean of the others would favour plans whose hard objects failed.
    """

    locator: Locator = field(converter=as_locator)
    """Who looks: a `Detector`, or a VLM, which is asked for boxes."""
    missing: float = field(default=0.0, validator=[validators.ge(0.0), validators.le(1.0)])
    """What a planned object counts that was looked for and not located; 0 as published. One without a box is 0."""
    duplicates: Literal["ignored", "zeros"] = field(default="ignored", validator=validators.in_(("ignored", "zeros")))
    """What a located box without a planned partner does: nothing, as published, or it counts as one more object of
    value 0, so that three dogs drawn for one planned are a third."""
    max_area: float = field(default=1.0)
    """Fraction of the canvas; a planned box that covers more is none, so 0. 1 as published: any box counts. Below
    it, boxes the size of the picture, which agree with any background, earn nothing: 0.9 where plans learn to do so."""

    @max_area.validator
    def _of_the_canvas(self, _: object, value: float) -> None:
        if not 0 < value <= 1:
            raise ConfigError(f"max_area must be a fraction of the canvas in (0, 1], got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """The image."""
        return frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Looks for all names in all images at once, and scores each trajectory."""
        asked = [self._sights(trajectory) for trajectory in trajectories]
        answers = iter(located(self.locator, [sight for sights in asked for sight in sights.values()]))
        found = [dict(zip(sights, islice(answers, len(sights)), strict=True)) for sights in asked]
        pairs = zip(trajectories, found, strict=True)
        return [Verdict.of(NAME, self._score(trajectory, names)) for trajectory, names in pairs]

    def _sights(self, trajectory: Trajectory) -> dict[str, Sight]:
        """Returns what to look for, by plain name."""
        image = trajectory.image
        if image is None:
            return {}
        names = dict.fromkeys(plain_name(each.name) for each in self._usable(trajectory.plan) if each.box)
        return {name: Sight(image, name) for name in names}

    def _usable(self, plan: Plan | None) -> Iterator[PlannedObject]:
        """Yields the planned objects, without the boxes that are too large to count."""
        for each in plan.objects if plan else ():
            large = each.box is not None and each.box.area > self.max_area * CANVAS**2
            yield evolve(each, box=None) if large else each

    def _score(self, trajectory: Trajectory, found: Mapping[str, Found]) -> Score:
        if trajectory.image is None:
            return Score(0.0, "no image")
        planned = list(self._usable(trajectory.plan))
        if not planned:
            return Score(0.0, "no planned objects")
        cost = total_cost([each.cost for each in found.values()])
        blind = [each.note for each in found.values() if each.boxes is None]
        if blind:
            return Score(None, blind[0], cost)
        seen = [PlannedObject(name, box) for name, each in found.items() for box in each.boxes or ()]
        return Score(self._agreement(planned, seen), cost=cost)

    def _agreement(self, planned: Sequence[PlannedObject], seen: Sequence[PlannedObject]) -> float:
        pairs = match(planned, seen)
        values = [self.missing if partner is None and planned[i].box else iou for i, partner, iou in pairs]
        num_matched = sum(partner is not None for _, partner, _ in pairs)
        num_spare = len(seen) - num_matched if self.duplicates == "zeros" else 0
        return sum(values) / (len(planned) + num_spare)
