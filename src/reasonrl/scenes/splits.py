"""Prompts of the drawn world, split so that each test split asks one question.

train     what a policy may learn from: at most three objects
test      the same distribution, other prompts
held_out  two kinds of objects together, or one on a side of the other, as train never has them
inverted  "above a cross is a circle": a phrasing that train never has, in words that it has
counts    so many of a kind as train never has: "two red circles"
longer    four objects

What is held out is decided by hashing. No single kind is: a red circle that was never drawn has
image tokens that were never seen, which no policy could produce.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from itertools import combinations, count, islice

from reasonrl.relations import PHRASES
from reasonrl.scenes.grammar import (
    CATEGORIES,
    RELATIONS,
    SPOKEN,
    Link,
    Request,
    Wanted,
    parse_prompt,
    write_prompt,
)
from reasonrl.scenes.world import COLORS, SHAPES, TEXTURES, check_word

NAMES = ("train", "test", "held_out", "inverted", "counts", "longer")
SIZE_OF = {name: 1200 if name == "train" else 120 for name in NAMES}
MOST_TRAINED = 3
"""Objects in a prompt of every split but `longer`."""
HELD_PAIRS, HELD_SIDES, HELD_COUNTS, TESTED = 0.15, 0.10, 0.20, 0.10
"""Fractions that hashing holds out: of pairs, of related pairs, of counted kinds, of prompts."""


Made = tuple[str, Request]
Maker = Callable[[random.Random, str], Made | None]


@cache
def load(name: str) -> tuple[str, ...]:
    """Returns the packaged prompts of a split; raises DataError for an unknown name."""
    check_word(name, NAMES, "split of the drawn world")
    text = (files("reasonrl.scenes") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def build() -> dict[str, tuple[str, ...]]:
    """Returns what the packaged files hold, the same on every machine, in 4 seconds."""
    return {name: _balanced(name, SIZE_OF[name]) for name in NAMES}


def stream(name: str, *, seed: int) -> Iterator[str]:
    """Yields random prompts of a split without end, categories in turn; splits share no prompt."""
    check_word(name, NAMES, "split of the drawn world")
    return (text for text, _ in _made(name, seed))


def _made(name: str, seed: int) -> Iterator[Made]:
    rng = random.Random(f"{name} {seed}")
    makers = [_MAKERS[c] for c in CATEGORIES if c in _CATEGORIES_OF.get(name, CATEGORIES)]
    for turn in count():
        made = None
        while made is None or _split_of(*made) != name:
            made = makers[turn % len(makers)](rng, name)
        yield made


def split_of(text: str) -> str | None:
    """Returns the split that a prompt belongs to; None for what would ask two questions at once."""
    return _split_of(text, parse_prompt(text))


def _split_of(text: str, request: Request) -> str | None:
    asked = [
        name
        for name, applies in (
            ("held_out", holds_out(request)),
            ("inverted", any(text.lower().startswith(f"{phrase} ") for phrase in PHRASES)),
            ("counts", holds_out_count(request)),
            ("longer", len(request.instances) > MOST_TRAINED),
        )
        if applies
    ]
    if asked:
        return asked[0] if len(asked) == 1 else None
    return "test" if _falls_in(TESTED, "prompt", text) else "train"


def holds_out(request: Request) -> bool:
    """Returns whether train must not have a pair of kinds, or one on that side of the other.

    A side is a layout, not a wording: "a left of b" and "b right of a" are one.
    """
    names = [w.name for w in request.wanted]
    pairs = [sorted(pair) for pair in combinations(names, 2)]
    sides = [_side(names[i], link, names[j]) for i, link, j in request.relations]
    return any(_falls_in(HELD_PAIRS, "pair", *pair) for pair in pairs) or any(
        _falls_in(HELD_SIDES, "side", *side) for side in sides
    )


def holds_out_count(request: Request) -> bool:
    """Returns whether train must not have so many of a kind."""
    several = [w for w in request.wanted if w.count > 1]
    return any(_falls_in(HELD_COUNTS, "count", str(w.count), w.name) for w in several)


def _side(a: str, relation: str, b: str) -> tuple[str, str, str]:
    inverse = next(r.inverse for r in RELATIONS if r == relation)
    return min((a, str(relation), b), (b, str(inverse), a))


def _falls_in(frac: float, *key: str) -> bool:
    digest = blake2b("|".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < frac * 2**64


def _balanced(name: str, size: int) -> tuple[str, ...]:
    """Returns distinct prompts, as many of each category as there are, in a mixed order."""
    found: dict[str, dict[str, None]] = {}
    for text, request in islice(_made(name, seed=0), 6 * size + 2000):
        found.setdefault(request.category, {})[text] = None
    chosen: list[str] = []
    fewest_first = sorted(found.values(), key=len)
    for num_left, texts in zip(range(len(found), 0, -1), fewest_first, strict=True):
        chosen += list(texts)[: (size - len(chosen)) // num_left]
    return tuple(sorted(chosen, key=lambda text: blake2b(text.encode()).digest()))


def _kind(rng: random.Random, *, color: bool = False, texture: bool = False) -> Wanted:
    return Wanted(
        rng.choice(SHAPES),
        rng.choice(tuple(COLORS)) if color else None,
        rng.choice(TEXTURES[1:]) if texture else None,
    )


def _num(rng: random.Random, split: str) -> int:
    """Returns how many objects a list names; single ones cannot be held out."""
    if split == "longer":
        return MOST_TRAINED + 1
    return rng.choice((1, 2, 2, 2, 3))


def _list_of(**attributes: bool) -> Maker:
    def write(rng: random.Random, split: str) -> Made | None:
        kinds = [_kind(rng, **attributes) for _ in range(_num(rng, split))]
        return _say(rng, Request(tuple(kinds)))

    return write


def _spatial(rng: random.Random, split: str) -> Made | None:
    color = rng.random() < 0.75
    kinds = (_kind(rng, color=color), _kind(rng, color=color))
    request = Request(kinds, (_link(rng, 0, 1),))
    return _say(rng, request, inverted=split == "inverted")


def _numeracy(rng: random.Random, split: str) -> Made | None:
    total = MOST_TRAINED + (split == "longer")
    first = rng.randint(2, MOST_TRAINED)
    second = rng.randint(0, total - first)
    color = rng.random() < 0.6
    kinds = [_kind(rng, color=color), _kind(rng, color=color)]
    if kinds[0].shape == kinds[1].shape:
        return None
    counted = [Wanted(k.shape, k.color, None, n) for k, n in zip(kinds, (first, second), strict=True) if n]
    rng.shuffle(counted)
    return _say(rng, Request(tuple(counted)))


def _complex(rng: random.Random, split: str) -> Made | None:
    """Three objects (or four), two attributes or more; a list, one relation, or two."""
    num = MOST_TRAINED + (split == "longer")
    kinds = [_kind(rng, color=rng.random() < 0.8, texture=rng.random() < 0.3) for _ in range(num)]
    if sum(bool(k.color) + bool(k.texture) for k in kinds) < 2:
        return None
    second = _link(rng, 2, 3) if num > MOST_TRAINED else _link(rng, 0, 2)
    forms = ((), (_link(rng, 0, 1),), (_link(rng, 0, 1), second))
    return _say(rng, Request(tuple(kinds), rng.choice(forms)))


_MAKERS: dict[str, Maker] = {
    "color": _list_of(color=True),
    "shape": _list_of(),
    "texture": _list_of(texture=True),
    "spatial": _spatial,
    "numeracy": _numeracy,
    "complex": _complex,
}
_CATEGORIES_OF = {
    "held_out": ("color", "shape", "texture", "spatial", "complex"),
    "inverted": ("spatial",),
    "counts": ("numeracy",),
    "longer": ("color", "shape", "texture", "numeracy", "complex"),
}


def _link(rng: random.Random, i: int, j: int) -> Link:
    return i, rng.choice(RELATIONS), j


def _say(rng: random.Random, request: Request, *, inverted: bool = False) -> Made | None:
    """Returns a prompt in random words, or None where one object could pass for two kinds."""
    if any(_could_be_one(a, b) for a, b in combinations(request.wanted, 2)):
        return None
    phrases = {relation: rng.choice(spoken) for relation, spoken in SPOKEN.items()}
    verb = "is" if rng.random() < 0.3 else ""
    return write_prompt(request, phrases=phrases, verb=verb, inverted=inverted), request


def _could_be_one(a: Wanted, b: Wanted) -> bool:
    said = ((a.shape, b.shape), (a.color, b.color), (a.texture, b.texture))
    return all(mine is None or other is None or mine == other for mine, other in said)
