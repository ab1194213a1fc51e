"""Agreement of two rankings, with ties and by prompt: Kendall's tau, Spearman's rho, bootstrap intervals.

Values that differ by less than 1e-9 of the largest are tied, so that 0.1 + 0.2 and 0.3 are. Intervals resample
prompts, never trajectories: members of a group are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

TIE = 1e-9
"""Of the largest absolute value: what lies closer is tied."""
NUM_RESAMPLES = 1000
FEWEST = 4
"""Prompts that an interval needs; with fewer there is none."""
MOST_BLOCKS = 400
"""Beyond so many prompts, τ and ρ over all pairs resample blocks of prompts: tables grow by the square."""
_EXACT_FLIPS = 12

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]


@frozen
class Figure:
    """A statistic and its 95% percentile bootstrap interval; None = undefined, or too few prompts for an interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@frozen
class Agreement:
    """How far two scores of the same things rank them alike, each figure in [-1, 1]."""

    n: int
    """Trajectories that both have scored."""
    num_groups: int
    kendall: Figure
    spearman: Figure
    within_tau: Figure
    """Kendall's tau of the pairs that share a prompt and differ in the second score: right order less wrong order, over
    all of them. What a baseline by group lets through, and 1 wherever no such pair is wrong or tied."""
    within_kendall: Figure
    """Tau-b of all pairs that share a prompt: below 1 also where the first score splits what the second ties."""
    within_spearman: Figure
    tied_groups: float | None
    """Share of groups (of two or more) in which the first score says the same of every member."""
    tied_pairs: float | None
    """Share of pairs within prompts that the second score tells apart and the first does not."""


@frozen
class Retest:
    """How far two answers to one question differ, in units of the score."""

    n: int
    sd: Figure
    """Standard deviation of one answer: the root of the mean squared difference over 2."""
    largest: float | None
    flips: Figure
    """Share of pairs within prompts, told apart both times, whose order turned round."""


@frozen
class Order:
    """What a member's score owes to its place in the group, in units of the score."""

    n: int
    by_position: tuple[float | None, ...]
    """Mean change of a member that moves to this place, against its mean over both; the last of a group = the last."""
    to_front: Figure
    """Mean change of a member that moves from the last place to the first, by least squares."""
    excess: Figure
    """Mean absolute change where the order changed, less that where nothing did."""


def dense_ranks(values: Sequence[float] | Floats) -> Ranks:
    """Returns 0 for the smallest, 1 for the next, ...; tied values share a rank."""
    table = np.asarray(values, np.float64)
    if not len(table):
        return np.zeros(0, np.int64)
    order = np.argsort(table, kind="stable")
    apart = np.diff(table[order]) > TIE * np.abs(table).max()
    ranks = np.empty(len(table), np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(apart)])
    return ranks


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns tau-b (Kendall 1945), Σ sgn·sgn / √(Σ sgn²·Σ sgn²) over pairs; None where one of them is constant."""
    blocks = _blocks(dense_ranks(x), dense_ranks(y), np.zeros(len(x), np.int64))
    return _one(_tau(blocks, np.ones((1, 1))))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns rho, the correlation of average ranks; None where one of them is constant."""
    return _one(_rho(dense_ranks(x), dense_ranks(y), np.ones((1, len(x)))))


def agreement(x: Sequence[float], y: Sequence[float], groups: Sequence[object], *, seed: int = 0) -> Agreement:
    """Returns how score x agrees with score y over all pairs, and over those within a group, by prompt."""
    labels = _labels(groups)
    ranks_x, ranks_y = dense_ranks(x), dense_ranks(y)
    size = int(labels.max()) + 1 if len(labels) else 0
    weights = _resamples(size, seed)
    once = np.ones((1, size))
    parts = labels % MOST_BLOCKS
    blocks = _blocks(ranks_x, ranks_y, parts)
    by_part = weights if size <= MOST_BLOCKS else _resamples(MOST_BLOCKS, seed)
    whole = np.ones((1, min(size, MOST_BLOCKS)))
    pairs = [np.array([block.sum() for block in each]) for each in _pair_signs(ranks_x, ranks_y, labels)]
    ranked = _rank_sums(ranks_x, ranks_y, labels)
    both, mine, theirs = pairs
    several = np.bincount(labels, minlength=size) > 1
    told_apart = _told_apart(ranks_x, ranks_y, labels)
    return Agreement(
        n=len(labels),
        num_groups=size,
        kendall=_figure(_tau(blocks, whole), _tau(blocks, by_part)),
        spearman=_figure(_rho(ranks_x, ranks_y, whole[:, parts]), _rho(ranks_x, ranks_y, by_part[:, parts])),
        within_tau=ratio(both, theirs, seed=seed),
        within_kendall=_figure(_pooled(pairs, once), _pooled(pairs, weights)),
        within_spearman=_figure(_pooled(ranked, once), _pooled(ranked, weights)),
        tied_groups=float((mine[several] == 0).mean()) if several.any() else None,
        tied_pairs=1 - told_apart / float(theirs.sum()) if theirs.sum() else None,
    )


def retest(first: Sequence[float], second: Sequence[float], groups: Sequence[object], *, seed: int = 0) -> Retest:
    """Returns how far two answers to the same questions differ."""
    labels = _labels(groups)
    change = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    both, _, _ = _pair_signs(dense_ranks(first), dense_ranks(second), labels)
    turned = np.array([float((block < 0).sum()) for block in both])
    told = np.array([float((block != 0).sum()) for block in both])
    squares = [_sums(labels, weights) for weights in (change**2, np.full(len(change), 2.0))]
    return Retest(
        n=len(change),
        sd=ratio(*squares, seed=seed, root=True),
        largest=float(np.abs(change).max()) if len(change) else None,
        flips=ratio(turned, told, seed=seed),
    )


def order(
    first: Sequence[float],
    again: Sequence[float],
    moved: Sequence[float],
    places: Sequence[tuple[float, float]],
    groups: Sequence[object],
    *,
    seed: int = 0,
    num_places: int = 5,
) -> Order:
    """Returns what places do: `first` and `again` were asked in one order, `moved` in another.

    `places` are (before, after), each from 0, the first of its group, to 1, the last.
    """
    labels = _labels(groups)
    a, b, c = (np.asarray(each, np.float64) for each in (first, again, moved))
    before, after = (np.array([pair[k] for pair in places], np.float64) for k in (0, 1))
    change, step = c - (a + b) / 2, before - after
    slope = [_sums(labels, weights) for weights in (change * step, step * step)]
    excess = np.abs(c - a) - np.abs(b - a)
    count = [_sums(labels, weights) for weights in (excess, np.ones(len(excess)))]
    bins = np.rint(np.concatenate([before, after]) * (num_places - 1)).astype(int)
    halves = np.concatenate([-change, change]) / 2
    by_place = [halves[bins == place] for place in range(num_places)]
    return Order(
        n=len(change),
        by_position=tuple(float(each.mean()) if len(each) else None for each in by_place),
        to_front=ratio(*slope, seed=seed),
        excess=ratio(*count, seed=seed),
    )


def chance(values: Sequence[float] | Floats, *, seed: int = 0) -> float:
    """Returns how often a mean as large comes of random signs, in (0, 1]: a one-sided sign-flip test.

    Exact up to 12 values, of which the smallest answer is 2⁻ⁿ; beyond them, of 4096 random flips.
    """
    table = np.asarray(values, np.float64)
    if len(table) <= _EXACT_FLIPS:
        signs = 1.0 - 2 * (np.arange(2 ** len(table))[:, None] >> np.arange(len(table)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (2**_EXACT_FLIPS, len(table)))
        signs[0] = 1.0  # what was seen is one of them
    return float((signs @ table >= table.sum() - TIE * np.abs(table).sum()).mean())


def mean(values: Sequence[float], groups: Sequence[object], *, seed: int = 0) -> Figure:
    """Returns the mean with its interval by group."""
    labels = _labels(groups)
    table = np.asarray(values, np.float64)
    return ratio(_sums(labels, table), _sums(labels, np.ones(len(table))), seed=seed)


def ratio(above: Floats, below: Floats, *, seed: int = 0, root: bool = False) -> Figure:
    """Returns Σ above / Σ below over groups (or its root), resampling groups; undefined where Σ below is 0."""

    def of(weights: Floats) -> Floats:
        under = weights @ below
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(under > 0, weights @ above / under, np.nan)
        return np.sqrt(share) if root else share

    return _figure(of(np.ones((1, len(above)))), of(_resamples(len(above), seed)))


# ---- by prompt ----


def _labels(groups: Sequence[object]) -> Ranks:
    """Returns 0, 1, 2, ... for the groups, in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)


def _sums(labels: Ranks, values: Floats) -> Floats:
    """Returns the sum of the values of each group."""
    return np.bincount(labels, values).astype(np.float64)


def _resamples(size: int, seed: int) -> Floats:
    """Returns how often each of `size` groups was drawn, (resamples, size)."""
    if size < FEWEST:
        return np.zeros((0, size))
    rng = np.random.default_rng(seed)
    return rng.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES).astype(np.float64)


def _figure(value: Floats, resampled: Floats) -> Figure:
    found = _one(value)
    known = resampled[~np.isnan(resampled)]
    if found is None or not len(known):
        return Figure(found)
    low, high = np.quantile(known, [0.025, 0.975])
    return Figure(found, float(low), float(high))


def _one(values: Floats) -> float | None:
    return None if not len(values) or np.isnan(values[0]) else float(values[0])


def _correlation(both: Floats, mine: Floats, theirs: Floats) -> Floats:
    """Returns Σ xy / √(Σ x²·Σ y²), NaN where a sum is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = both / np.sqrt(mine * theirs)
    return np.where((mine > 0) & (theirs > 0), np.clip(found, -1, 1), np.nan)


# ---- Kendall: sums over pairs, kept by the two groups that a pair is from ----


def _signs(ranks: Ranks, rows: Ranks) -> Floats:
    return np.sign(ranks[rows][:, None] - ranks[None, :]).astype(np.float64)


def _blocks(x: Ranks, y: Ranks, labels: Ranks) -> tuple[Floats, Floats, Floats]:
    """Returns Σ sgn x·sgn y, Σ sgn² x and Σ sgn² y over the pairs of each two groups, three (P, P) tables."""
    size = int(labels.max()) + 1 if len(labels) else 0
    column = np.zeros((len(labels), size))
    column[np.arange(len(labels)), labels] = 1
    tables = tuple(np.zeros((size, size)) for _ in range(3))
    for group in range(size):
        rows = np.flatnonzero(labels == group)
        a, b = _signs(x, rows), _signs(y, rows)
        for table, product in zip(tables, (a * b, a * a, b * b), strict=True):
            table[group] = product.sum(0) @ column
    return tables[0], tables[1], tables[2]


def _tau(blocks: tuple[Floats, Floats, Floats], weights: Floats) -> Floats:
    """Returns tau-b of the sample in which group p stands `weights[:, p]` times."""
    return _correlation(*(((weights @ table) * weights).sum(1) for table in blocks))


def _pooled(sums: Sequence[Floats], weights: Floats) -> Floats:
    return _correlation(*(weights @ each for each in sums))


def _pair_signs(x: Ranks, y: Ranks, labels: Ranks) -> tuple[list[Floats], list[Floats], list[Floats]]:
    """Returns sgn x·sgn y, sgn² x and sgn² y of the pairs within each group."""
    found: tuple[list[Floats], list[Floats], list[Floats]] = ([], [], [])
    for group in range(int(labels.max()) + 1 if len(labels) else 0):
        rows = np.flatnonzero(labels == group)
        a, b = (_signs(ranks[rows], np.arange(len(rows))) for ranks in (x, y))
        for kept, product in zip(found, (a * b, a * a, b * b), strict=True):
            kept.append(product)
    return found


def _told_apart(x: Ranks, y: Ranks, labels: Ranks) -> float:
    both, _, _ = _pair_signs(x, y, labels)
    return float(sum((block != 0).sum() for block in both))


# ---- Spearman ----


def _rho(x: Ranks, y: Ranks, weights: Floats) -> Floats:
    """Returns rho of the sample in which observation i stands `weights[:, i]` times."""
    a, b = (_centred(_average_ranks(ranks, weights), weights) for ranks in (x, y))
    return _correlation((weights * a * b).sum(1), (weights * a * a).sum(1), (weights * b * b).sum(1))


def _average_ranks(ranks: Ranks, weights: Floats) -> Floats:
    """Returns each observation's rank among all, ties their mean, up to a constant."""
    order = np.argsort(ranks, kind="stable")
    begins = np.diff(ranks[order], prepend=-1) > 0
    many = np.add.reduceat(weights[:, order], np.flatnonzero(begins), axis=1) if len(ranks) else weights
    level = np.empty(len(ranks), np.int64)
    level[order] = np.cumsum(begins) - 1
    average: Floats = (np.cumsum(many, 1) - many / 2)[:, level]
    return average


def _centred(ranks: Floats, weights: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        average = (weights * ranks).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    return ranks - average


def _rank_sums(x: Ranks, y: Ranks, labels: Ranks) -> list[Floats]:
    """Returns Σ ab, Σ a² and Σ b² of each group, a and b its centred average ranks."""
    size = int(labels.max()) + 1 if len(labels) else 0
    sums = np.zeros((3, size))
    for group in range(size):
        rows = np.flatnonzero(labels == group)
        once = np.ones((1, len(rows)))
        a, b = (_centred(_average_ranks(ranks[rows], once), once)[0] for ranks in (x, y))
        sums[:, group] = (a * b).sum(), (a * a).sum(), (b * b).sum()
    return list(sums)
