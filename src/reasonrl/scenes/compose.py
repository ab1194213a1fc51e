"""Scenes for prompts and the plans that describe them; and the imperfect teacher who shows both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from attrs import evolve, field, frozen, validators
from numpy.typing import NDArray

from reasonrl.errors import DataError
from reasonrl.plan import BOX_END, BOX_START, OBJ_END, OBJ_START, Box
from reasonrl.relations import Relation, holds
from reasonrl.scenes.codec import codebook, encode
from reasonrl.scenes.grammar import RELATIONS, Link, Request, Wanted, parse_prompt
from reasonrl.scenes.world import (
    CELLS,
    COLORS,
    MOST_OBJECTS,
    PATCH,
    SHAPES,
    SIZES,
    SOLID,
    TEXTURES,
    Scene,
    SceneObject,
    are_apart,
    box_at,
    draw,
)

SOLID_FRAC = 0.85
"""How often an object is solid where its texture is free."""
_EDGES = tuple(size // PATCH for size in SIZES.values())


def _probability(default: float) -> float:
    checked: float = field(default=default, validator=validators.and_(validators.ge(0), validators.le(1)))
    return checked


@frozen
class Faults:
    """How often the teacher is wrong, each a probability."""

    wrong_relation: float = _probability(0.3)
    """A prompt with relations: one of them is drawn as another, in the boxes of plan and image."""
    swapped_attributes: float = _probability(0.15)
    """Two objects exchange colour and texture, or one attribute is drawn anew."""
    wrong_count: float = _probability(0.25)
    """A prompt with counts: one object more or less."""
    corrupted_tokens: float = _probability(0.02)
    """An image token, each by itself, is replaced by a random one."""


NO_FAULTS = Faults(0, 0, 0, 0)


@frozen(eq=False)
class Demonstration:
    """What the teacher shows for a prompt: a plan in wire form and (64,) image tokens."""

    prompt: str
    plan_text: str
    tokens: NDArray[np.int64]


def place(request: Request, rng: np.random.Generator, max_tries: int = 500) -> Scene:
    """Returns a random scene, its objects in the order of `request.instances`, that it holds for.

    Raises DataError where no layout was found.
    """
    kinds = [request.wanted[i] for i in request.instances]
    at = request.instances.index
    links = [(at(i), relation, at(j)) for i, relation, j in request.relations]
    for _ in range(max_tries):
        boxes = _boxes(len(kinds), links, rng)
        if boxes is not None:
            return Scene(tuple(_paint(k, b, rng) for k, b in zip(kinds, boxes, strict=True)))
    raise DataError(f"found no layout in {max_tries} tries for {request}")


def _boxes(num: int, links: Sequence[Link], rng: np.random.Generator) -> list[Box] | None:
    """Draws a box for each object, where there is room and its relations hold; None if nowhere."""
    boxes: list[Box] = []
    for index in range(num):
        closed = [link for link in links if max(link[0], link[2]) == index]
        fit = [
            box
            for box in _places(_EDGES[int(rng.integers(len(_EDGES)))])
            if all(are_apart(box, other) for other in boxes)
            and all(holds(r, [*boxes, box][i], [*boxes, box][j]) for i, r, j in closed)
        ]
        if not fit:
            return None
        boxes.append(fit[int(rng.integers(len(fit)))])
    return boxes


@cache
def _places(edge: int) -> tuple[Box, ...]:
    corners = product(range(CELLS - edge + 1), repeat=2)
    return tuple(box_at(column, row, edge) for column, row in corners)


def _paint(kind: Wanted, box: Box, rng: np.random.Generator) -> SceneObject:
    solid = rng.random() < SOLID_FRAC
    texture = kind.texture or (SOLID if solid else _pick(TEXTURES[1:], rng))
    return SceneObject(kind.shape, kind.color or _pick(tuple(COLORS), rng), texture, box)


def describe(scene: Scene, request: Request) -> str:
    """Returns the Generation Chain-of-Thought of a scene in wire form: every object, with its box.

    The word between two objects is the prompt's relation where it links them, else "and".
    `scene.objects` are in the order of `request.instances`; further ones follow with "and".
    """
    places = request.instances
    said: dict[tuple[int, int], Relation] = {}
    for i, relation, j in request.relations:
        said[i, j], said[j, i] = relation, relation.inverse or relation
    text = ""
    for index, item in enumerate(scene.objects):
        pair = places[max(index - 1, 0) : index + 1] if index < len(places) else ()
        word = said.get((pair[0], pair[1])) if len(pair) == 2 else None
        text += f" {word.value if word else 'and'} " if index else ""
        text += f"{OBJ_START}{item.name}{OBJ_END} {BOX_START}{item.box}{BOX_END}"
    return text


def demonstration(prompt_text: str, rng: np.random.Generator, faults: Faults | None = None) -> Demonstration:
    """Returns a plan and an image for a prompt, with faults; plan and image fail together.

    The plan's words keep the prompt's relation, so a wrong relation shows in its boxes only.
    Corrupted tokens are the image's alone.
    """
    faults = faults or Faults()
    asked = parse_prompt(prompt_text)
    drawn = asked
    if asked.relations and rng.random() < faults.wrong_relation:
        drawn = _with_wrong_relation(drawn, rng)
    if asked.category == "numeracy" and rng.random() < faults.wrong_count:
        drawn = _with_wrong_count(drawn, rng)
    scene = place(drawn, rng)
    if rng.random() < faults.swapped_attributes:
        scene = _with_wrong_attributes(scene, drawn, rng)
    words = evolve(drawn, relations=asked.relations)
    tokens = encode(draw(scene))
    corrupted = rng.random(len(tokens)) < faults.corrupted_tokens
    noise = rng.integers(0, len(codebook()), len(tokens))
    return Demonstration(prompt_text, describe(scene, words), np.where(corrupted, noise, tokens))


def _with_wrong_relation(request: Request, rng: np.random.Generator) -> Request:
    """Turns one relation into its inverse (half of the time) or another; "next to" too."""
    at = int(rng.integers(len(request.relations)))
    i, relation, j = request.relations[at]
    directions = [r for r in RELATIONS if r not in (relation, Relation.NEXT_TO)]
    wrong = relation.inverse
    if wrong in (None, relation) or rng.random() < 0.5:
        wrong = directions[int(rng.integers(len(directions)))]
    assert wrong is not None
    links = [*request.relations[:at], (i, wrong, j), *request.relations[at + 1 :]]
    return evolve(request, relations=tuple(links))


def _with_wrong_count(request: Request, rng: np.random.Generator) -> Request:
    """Asks for one object more or less: never none of a kind, never more than four in all."""
    total = len(request.instances)
    changes = [
        (i, step)
        for i, wanted in enumerate(request.wanted)
        for step in (-1, 1)
        if wanted.count + step >= 1 and total + step <= MOST_OBJECTS
    ]
    if not changes:  # cannot be with at most four objects, unless each kind is single
        return request
    at, step = changes[int(rng.integers(len(changes)))]
    wanted = [evolve(w, count=w.count + step * (i == at)) for i, w in enumerate(request.wanted)]
    return evolve(request, wanted=tuple(wanted))


def _with_wrong_attributes(scene: Scene, request: Request, rng: np.random.Generator) -> Scene:
    """Exchanges colour and texture of two objects, or redraws one attribute that was asked for."""
    objects = list(scene.objects)
    if len(objects) > 1 and rng.random() < 0.5:
        i, j = rng.choice(len(objects), 2, replace=False).tolist()
        a, b = objects[i], objects[j]
        objects[i] = evolve(a, color=b.color, texture=b.texture)
        objects[j] = evolve(b, color=a.color, texture=a.texture)
    else:
        i = int(rng.integers(len(objects)))
        kind = request.wanted[request.instances[i]]
        what = [k for k in ("color", "texture") if getattr(kind, k)] or ["shape"]
        attribute = _pick(what, rng)
        known = {"color": tuple(COLORS), "texture": TEXTURES, "shape": SHAPES}
        others = [word for word in known[attribute] if word != getattr(objects[i], attribute)]
        words = {k: getattr(objects[i], k) for k in known} | {attribute: _pick(others, rng)}
        objects[i] = SceneObject(**words, box=objects[i].box)
    return Scene(tuple(objects))


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
