"""Graded trajectories: drawn scenes whose right and wrong are known exactly, several grades to a prompt.

A judge that cannot rank these will not rank what a policy draws; one that can may still fail on photographs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from attrs import evolve, frozen
from PIL import Image

from reasonrl.errors import ConfigError, DataError
from reasonrl.judges.scene import ScenePromptImage, SceneReasoningImage, SceneSemantic, SceneSpatial
from reasonrl.plan import PlannedObject, print_object
from reasonrl.relations import holds
from reasonrl.scenes import compose, splits, truth, world
from reasonrl.scenes.grammar import CATEGORIES, Request, Wanted, parse_prompt
from reasonrl.scenes.world import Scene, SceneObject
from reasonrl.types import Prompt, Trajectory

EXACT = {
    "prompt-image": ScenePromptImage(),
    "semantic": SceneSemantic(),
    "spatial": SceneSpatial(),
    "reasoning-image": SceneReasoningImage(),
}
"""The four exact scores, by the question they answer (`judges/scene.py`)."""
QUALITIES = {
    "right": "plan and image as asked",
    "elsewhere": "image as asked, but not where the plan says",
    "attribute": "one colour, texture or shape wrong, in both",
    "relation": "one relation wrong, in the boxes of both",
    "count": "one object too many or too few of a kind, in both",
    "missing": "one object missing, in both",
    "extra": "one object that nobody asked for, in both",
    "unplaced": "image as asked, plan without boxes",
    "image unrelated": "plan as asked, image of other things",
    "plan unrelated": "image as asked, plan of other things",
    "unrelated": "plan and image of other things",
}
"""Every grade, and what it is."""
SOURCE = "train"
"""The split whose prompts are graded: the largest."""
SIDES = (world.SIDE, 448)
"""Pixels of a picture: as exact judges of drawn scenes read it, and enlarged for models that look at photographs."""
_TRIES = 200


@frozen(eq=False)
class Graded:
    """A trajectory, what is wrong with it, and its exact scores; its image has 64 pixels a side."""

    trajectory: Trajectory
    quality: str
    exact: Mapping[str, float]

    @property
    def group(self) -> str:
        """The id of its prompt."""
        return self.trajectory.prompt.id

    @property
    def category(self) -> str:
        """The category of its prompt."""
        return str(self.trajectory.prompt.facts["category"])

    def against(self, aspects: Iterable[str]) -> float:
        """Returns the exact reward of these aspects: DualStage's product, with what is not asked for left out."""
        named = set(aspects)
        plan = [self.exact[name] for name in ("semantic", "spatial") if name in named]
        factors = [self.exact[name] for name in ("prompt-image", "reasoning-image") if name in named]
        return float(np.prod([*factors, *([sum(plan) / len(plan)] if plan else [])]))


def graded_set(num: int, *, seed: int = 0) -> list[Graded]:
    """Returns groups of 8 to 11 grades for `num` prompts, categories in turn, members in a random order."""
    found = []
    for index, text in enumerate(_prompts(num, seed)):
        request = parse_prompt(text)
        rng = np.random.default_rng([seed, index])
        members = _members(request, rng)
        prompt = Prompt(f"audit:{index}", text, {"category": request.category})
        shuffled = [members[k] for k in rng.permutation(len(members))]
        found += [_graded(prompt, k, *member) for k, member in enumerate(shuffled)]
    return found


def seen(trajectory: Trajectory, side: int) -> Trajectory:
    """Returns a drawn trajectory as a judge sees it: its pictures enlarged to so many pixels."""
    return evolve(trajectory, images={name: enlarged(image, side) for name, image in trajectory.images.items()})


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Returns the picture enlarged by a whole factor, each pixel a square; ConfigError for a side that is none."""
    if side < world.SIDE or side % world.SIDE:
        raise ConfigError(f"a picture's side is a multiple of {world.SIDE} pixels, got {side}: 448 is one")
    return image if image.width == side else image.resize((side, side), Image.Resampling.NEAREST)


def _prompts(num: int, seed: int) -> list[str]:
    """Returns distinct prompts, categories in turn; ConfigError where there are not so many."""
    known = splits.load(SOURCE)
    if not 1 <= num <= len(known):
        raise ConfigError(f"an audit takes 1 to {len(known)} prompts, got {num}")
    rng = np.random.default_rng([seed, len(known)])
    order: list[str] = [known[k] for k in rng.permutation(len(known))]
    turns: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for text in order:
        turns[parse_prompt(text).category].append(text)
    longest = max(map(len, turns.values()))
    return [texts[k] for k in range(longest) for texts in turns.values() if k < len(texts)][:num]


def _graded(prompt: Prompt, member: int, quality: str, plan: str, scene: Scene) -> Graded:
    trajectory = Trajectory(prompt, (member,), texts={"reasoning": plan}, images={"image": world.draw(scene)})
    exact = {}
    for name, judge in EXACT.items():
        [verdict] = judge.judge([trajectory])
        value = verdict.total()
        assert value is not None, f"{name} of {prompt.text!r}: a drawn scene is always scored"
        exact[name] = value
    return Graded(trajectory, quality, exact)


def _members(request: Request, rng: np.random.Generator) -> list[tuple[str, str, Scene]]:
    """Returns (quality, plan, scene) of every grade that the prompt allows."""
    right = compose.place(request, rng)
    plan = compose.describe(right, request)
    other, other_plan = _strangers(request, rng)
    names = " and ".join(print_object(PlannedObject(item.name, None)) for item in right.objects)
    painted = _repainted(right, request, rng)
    members = [
        ("right", plan, right),
        ("elsewhere", plan, _elsewhere(right, request, rng)),
        ("attribute", compose.describe(painted, request), painted),
        ("unplaced", names, right),
        ("image unrelated", plan, other),
        ("plan unrelated", other_plan, right),
        ("unrelated", other_plan, other),
    ]
    if request.relations:
        turned = _turned(request, rng)
        members.append(("relation", compose.describe(turned, request), turned))
    if any(wanted.count > 1 for wanted in request.wanted):
        recounted = _recounted(request, rng)
        scene = compose.place(recounted, rng)
        members.append(("count", compose.describe(scene, evolve(recounted, relations=())), scene))
    if len(right.objects) > 1:
        members.append(("missing", *_missing(right, request, rng)))
    if len(right.objects) < world.MOST_OBJECTS:
        wider = evolve(request, wanted=(*request.wanted, _stranger(request, rng)))
        scene = compose.place(wider, rng)
        members.append(("extra", compose.describe(scene, request), scene))
    return members


def _elsewhere(right: Scene, request: Request, rng: np.random.Generator) -> Scene:
    """Returns the same objects in another layout that is right too."""
    for _ in range(_TRIES):
        other = compose.place(request, rng)
        if all(a.box.iou(b.box) < 0.5 for a, b in zip(right.objects, other.objects, strict=True)):
            pairs = zip(right.objects, other.objects, strict=True)
            return Scene(tuple(evolve(item, box=place.box) for item, place in pairs))
    raise DataError(f"found no second layout in {_TRIES} tries for {request}")


def _repainted(scene: Scene, request: Request, rng: np.random.Generator) -> Scene:
    """Returns the scene with one attribute that was asked for changed in one object."""
    objects = list(scene.objects)
    k = int(rng.integers(len(objects)))
    kind = request.wanted[request.instances[k]]
    known: dict[str, tuple[str, ...]] = {
        "shape": world.SHAPES,
        "color": tuple(world.COLORS),
        "texture": world.TEXTURES,
    }
    what = _pick([name for name in known if name != "shape" and getattr(kind, name)] or ["shape"], rng)
    word = _pick([word for word in known[what] if word != getattr(objects[k], what)], rng)
    changed: Any = {what: word}
    objects[k] = evolve(objects[k], **changed)
    return Scene(tuple(objects))


def _turned(request: Request, rng: np.random.Generator) -> Scene:
    """Returns a layout in which one relation does not hold: turned round, or too far for "next to"."""
    at = int(rng.integers(len(request.relations)))
    i, relation, j = request.relations[at]
    links = [*request.relations[:at], *request.relations[at + 1 :]]
    if relation.inverse not in (None, relation):
        assert relation.inverse is not None
        links.append((i, relation.inverse, j))
    for _ in range(_TRIES):
        scene = compose.place(evolve(request, relations=tuple(links)), rng)
        a, b = (scene.objects[request.instances.index(k)].box for k in (i, j))
        if not holds(relation, a, b):
            return scene
    raise DataError(f"found no layout that breaks {relation.value!r} in {_TRIES} tries for {request}")


def _recounted(request: Request, rng: np.random.Generator) -> Request:
    """Returns the request with one more or less of a kind that is asked for several times."""
    several = [k for k, wanted in enumerate(request.wanted) if wanted.count > 1]
    at = several[int(rng.integers(len(several)))]
    room = len(request.instances) < world.MOST_OBJECTS
    step = 1 if room and rng.random() < 0.5 else -1
    wanted = [evolve(kind, count=kind.count + step * (k == at)) for k, kind in enumerate(request.wanted)]
    return evolve(request, wanted=tuple(wanted))


def _missing(scene: Scene, request: Request, rng: np.random.Generator) -> tuple[str, Scene]:
    """Returns plan and scene with one object left out."""
    left = int(rng.integers(len(scene.objects)))
    fewer = Scene(tuple(item for k, item in enumerate(scene.objects) if k != left))
    # Its relations are said by place in the list, which holds only where the last one is left out.
    words = request if left == len(fewer.objects) else evolve(request, relations=())
    return compose.describe(fewer, words), fewer


def _strangers(request: Request, rng: np.random.Generator) -> tuple[Scene, str]:
    """Returns a scene of two things that nobody asked for, and its plan."""
    other = Request((_stranger(request, rng), _stranger(request, rng)), (), request.category)
    scene = compose.place(other, rng)
    return scene, compose.describe(scene, other)


def _stranger(request: Request, rng: np.random.Generator) -> Wanted:
    while True:
        kind = Wanted(_pick(world.SHAPES, rng), _pick(tuple(world.COLORS), rng), world.SOLID)
        drawn = SceneObject(kind.shape, str(kind.color), world.SOLID, world.box_at(0, 0, 2))
        if not any(truth.matches(wanted, drawn) for wanted in request.wanted):
            return kind


def _pick(words: Any, rng: np.random.Generator) -> str:
    return str(words[int(rng.integers(len(words)))])
