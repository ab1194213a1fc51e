"""Who meets whom: everybody equally many others, and as often in the first place as in the second."""

from __future__ import annotations

import random


def pairs_of(size: int, opponents: int | None, *, seed: str) -> list[tuple[int, int]]:
    """Returns pairs of 0..size−1, none twice; the first of a pair is shown first.

    The members stand in a circle, shuffled by the seed, and each meets the next few of it as the first of a pair.
    An odd number of opponents adds the one opposite, or, in a circle of odd size, one more.
    """
    wanted = size - 1 if opponents is None else min(opponents, size - 1)
    circle = list(range(size))
    random.Random(seed).shuffle(circle)
    steps, odd = divmod(wanted, 2)
    if odd and size % 2:
        steps, odd = steps + 1, 0
    pairs = [(circle[k], circle[(k + step) % size]) for step in range(1, steps + 1) for k in range(size)]
    half = size // 2
    return pairs + [(circle[k], circle[k + half]) for k in range(half) if odd]
