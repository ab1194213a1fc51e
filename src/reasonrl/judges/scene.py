"""Exact judges of drawn scenes: what GoT-R1 asks an MLLM, answered by counting. All scores are in [0, 1]."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, final

from attrs import field, frozen, validators
from PIL import Image

from reasonrl.errors import DataError
from reasonrl.interfaces import PointwiseJudge
from reasonrl.plan import Plan, PlannedObject
from reasonrl.relations import mean_iou
from reasonrl.scenes import detector, grammar, parser, truth, world
from reasonrl.types import Score, Trajectory

SPATIAL_FLOOR = 0.1
"""GoT-R1's R_spa is a mark from 1 to 10: contradictory layouts get a tenth, not nothing."""


@lru_cache(maxsize=4096)
def _request(text: str) -> grammar.Request | str:
    try:
        return grammar.parse_prompt(text)
    except DataError as error:
        return str(error)


def _asked(trajectory: Trajectory) -> grammar.Request | Score:
    """The prompt's request, or an abstention: a prompt that is no scene is not the policy's fault."""
    found = _request(trajectory.prompt.text)
    return Score(None, f"not a scene prompt: {found}") if isinstance(found, str) else found


def _image(trajectory: Trajectory) -> Image.Image | Score:
    """The image, or an abstention where it cannot be a drawn scene: the renderer's choice, not the policy's fault."""
    image = trajectory.image
    assert image is not None
    if image.size == (world.SIDE, world.SIDE):
        return image
    return Score(
        None, f"not a drawn scene: expected {world.SIDE}x{world.SIDE} pixels, got {image.width}x{image.height}"
    )


def _plan(trajectory: Trajectory) -> Plan:
    return Plan.parse(trajectory.reasoning or "")


@final
@frozen
class SceneSemantic(PointwiseJudge):
    """R_sem, prompt to reasoning: the fraction of objects and counts that the plan names, boxes ignored.

    1 = every object of the prompt and nothing else is named; a plan that names nothing gets 0.
    """

    def score(self, trajectory: Trajectory) -> Score:
        """Returns the mean over the objects, counts, and "nothing extra"."""
        request = _asked(trajectory)
        if isinstance(request, Score):
            return request
        named = [PlannedObject(o.name, None) for o in _plan(trajectory).objects]
        return Score(truth.named_fraction(request, truth.objects_of_plan(named)))


@final
@frozen
class SceneSpatial(PointwiseJudge):
    """R_spa, prompt to layout: the fraction of asked relations that the planned boxes hold, on a scale from 0.1.

    A prompt without relations asks that every named object has a box of its own. No boxes at all get 0.
    """

    def score(self, trajectory: Trajectory) -> Score:
        """Returns 0.1 + 0.9 × the fraction of relations (or placed objects)."""
        request = _asked(trajectory)
        if isinstance(request, Score):
            return request
        objects = truth.objects_of_plan([o for o in _plan(trajectory).objects if o.box])
        if not objects:
            return Score(0.0, "no planned boxes")
        return Score(SPATIAL_FLOOR + (1 - SPATIAL_FLOOR) * truth.layout_fraction(request, objects))


@final
@frozen
class SceneReasoningImage(PointwiseJudge):
    """R_RI, reasoning to image: the mean IoU of planned boxes with the objects found under their names.

    Matching is by name and one to one; a planned object that was not drawn adds 0, and no planned boxes get 0.
    """

    @property
    def needs(self) -> frozenset[str]:
        """The image."""
        return frozenset({"image"})

    def score(self, trajectory: Trajectory) -> Score:
        """Returns mean IoU over the planned objects."""
        image = _image(trajectory)
        if isinstance(image, Score):
            return image
        found = [PlannedObject(o.name, o.box) for o in parser.read_image(image).objects]
        return Score(mean_iou(_plan(trajectory).objects, found))


@final
@frozen
class ScenePromptImage(PointwiseJudge):
    """R_PI, prompt to image: the fraction of what was asked that the image shows; 1 = exactly the scene asked for.

    Objects, counts and relations count, and so does "nothing else". `eyes="soft"` looks through the pixel
    detector instead of the exact parser: a proxy that can be fooled, for studies of reward hacking.
    """

    eyes: Literal["exact", "soft"] = field(default="exact", validator=validators.in_(("exact", "soft")))

    @property
    def needs(self) -> frozenset[str]:
        """The image."""
        return frozenset({"image"})

    def score(self, trajectory: Trajectory) -> Score:
        """Returns the mean over the request's atoms."""
        request, image = _asked(trajectory), _image(trajectory)
        if isinstance(request, Score):
            return request
        if isinstance(image, Score):
            return image
        look = detector.read_image if self.eyes == "soft" else parser.read_image
        return Score(truth.fraction(request, look(image)))
