"""Statistics against their definitions, written as slowly as the books do."""

import math
import tracemalloc
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.audit import statistics
from reasonrl.audit.statistics import agreement, chance, dense_ranks, kendall, mean, order, retest, spearman

values = st.integers(-3, 3).map(lambda k: k / 4)
paired = st.lists(st.tuples(values, values), min_size=2, max_size=12)
grouped = st.lists(st.tuples(values, values, st.sampled_from("abcd")), min_size=2, max_size=20)


def sign(x):
    return (x > 0) - (x < 0)


def tau_by_definition(pairs):
    """Kendall 1945: concordant less discordant pairs, over the geometric mean of untied ones."""
    both = sum(sign(a - c) * sign(b - d) for (a, b), (c, d) in pairs)
    untied = [sum(p[k] != q[k] for p, q in pairs) for k in (0, 1)]
    return None if 0 in untied else both / math.sqrt(untied[0] * untied[1])


def average_ranks(numbers):
    return [sum(n < x for n in numbers) + (sum(n == x for n in numbers) + 1) / 2 for x in numbers]


def pearson(x, y):
    a, b = ([v - sum(z) / len(z) for v in z] for z in (x, y))
    below = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return None if below == 0 else sum(p * q for p, q in zip(a, b, strict=True)) / below


@given(paired)
def test_kendall_is_its_definition_over_all_pairs(rows):
    found = kendall(*zip(*rows, strict=True))
    assert found == pytest.approx(tau_by_definition(list(combinations(rows, 2))))


@given(paired)
def test_spearman_is_the_correlation_of_average_ranks(rows):
    x, y = zip(*rows, strict=True)
    assert spearman(x, y) == pytest.approx(pearson(average_ranks(x), average_ranks(y)))


@settings(deadline=None)  # the first example imports it
@given(paired)
def test_scipy_agrees(rows):
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*rows, strict=True)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


@given(grouped)
def test_tau_within_prompts_is_its_definition_over_the_pairs_that_share_one(rows):
    x, y, groups = zip(*rows, strict=True)
    pairs = [((a, b), (c, d)) for (a, b, g), (c, d, h) in combinations(rows, 2) if g == h]
    found = agreement(x, y, groups)
    assert found.within_kendall.value == pytest.approx(tau_by_definition(pairs))
    should = [(p, q) for p, q in pairs if p[1] != q[1]]
    ordered = sum(sign(p[0] - q[0]) * sign(p[1] - q[1]) for p, q in should) / len(should) if should else None
    assert found.within_tau.value == pytest.approx(ordered)
    missed = sum(p[0] == q[0] for p, q in should) / len(should) if should else None
    assert found.tied_pairs == pytest.approx(missed)
    several = [{a for a, _, g in rows if g == group} for group in set(groups) if groups.count(group) > 1]
    tied = sum(len(each) == 1 for each in several) / len(several) if several else None
    assert found.tied_groups == pytest.approx(tied)


@given(grouped, st.randoms())
def test_rows_and_the_names_of_groups_have_no_order(rows, random):
    def figures(table):
        x, y, groups = zip(*table, strict=True)
        found = agreement(x, y, groups)
        return [f.value for f in (found.kendall, found.spearman, found.within_kendall, found.within_spearman)]

    turned = random.sample(rows, len(rows))
    renamed = [(x, y, f"prompt {group}") for x, y, group in turned]
    assert figures(renamed) == pytest.approx(figures(rows))


@given(paired)
def test_both_are_symmetric_bounded_and_turned_by_a_sign(rows):
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    for figure in (kendall, spearman):
        found = figure(x, y)
        assert found == pytest.approx(figure(y, x))
        assert found == (None if found is None else pytest.approx(-figure(-x, y)))
        assert found is None or -1 <= found <= 1


@given(paired)
def test_growing_transforms_change_neither(rows):
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    for figure in (kendall, spearman):
        assert figure(np.exp(3 * x) - 7, y) == pytest.approx(figure(x, y))


@given(st.lists(values, min_size=2, max_size=12))
def test_a_score_agrees_with_itself_and_a_constant_with_nobody(numbers):
    once = 1.0 if len(set(numbers)) > 1 else None
    assert kendall(numbers, numbers) == once
    assert spearman(numbers, numbers) == pytest.approx(once)
    assert kendall(numbers, [2.0] * len(numbers)) is None
    assert spearman([2.0] * len(numbers), numbers) is None


def test_near_equal_scores_are_tied():
    assert dense_ranks([0.3, 0.1 + 0.2, 0.4]).tolist() == [0, 0, 1]
    assert kendall([0.3, 0.1 + 0.2, 0.4], [1, 1, 2]) == 1.0
    assert dense_ranks([1e-12, 2e-12]).tolist() == [0, 1]  # small scores are not near-equal ones


def test_splitting_what_the_truth_ties_costs_tau_b_and_not_the_tau_that_is_asked_for():
    truth, told = [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.9]
    found = agreement(told, truth, "aaaa")
    assert found.within_tau.value == 1.0
    assert found.within_kendall.value == pytest.approx(math.sqrt(1 / 2))


def test_a_golden_value():
    # By hand: 6 pairs, one tied in x: 4 concordant, 1 discordant, √(5·6) below.
    assert kendall([1, 1, 2, 3], [1, 2, 4, 3]) == pytest.approx(3 / math.sqrt(30))


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_the_fast_bootstrap_is_the_slow_one(seed):
    """Resampling block sums by weights gives what copying the prompts' rows gives."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(5), 3)
    x, y = rng.integers(0, 4, (2, 15)) / 4
    weights = statistics._resamples(5, seed)[:20]
    ranks = dense_ranks(x), dense_ranks(y)
    fast = statistics._tau(statistics._blocks(*ranks, groups), weights)
    rho = statistics._rho(*ranks, weights[:, groups])
    for k, drawn in enumerate(weights.astype(int)):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in range(5) for _ in range(drawn[g])])
        slow = kendall(x[rows], y[rows]), spearman(x[rows], y[rows])
        for quick, careful in zip((fast[k], rho[k]), slow, strict=True):
            assert (None if np.isnan(quick) else quick) == (None if careful is None else pytest.approx(careful))


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        quality = rng.normal(size=(20, 6))
        noisy = quality + rng.normal(size=(20, 6))
        figure = agreement(noisy.ravel(), quality.ravel(), np.repeat(range(20), 6), seed=trial).within_kendall
        held += figure.low <= 0.5 <= figure.high  # tau of a correlation of 1/√2 is 2/π·asin(1/√2) = 1/2
    assert 85 <= held <= 99


def test_members_of_one_prompt_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6))
    once = agreement(np.tile(x, 1), y, range(6)).kendall
    copies = agreement(np.tile(x, 30), np.tile(y, 30), list(range(6)) * 30).kendall
    assert copies.value == pytest.approx(once.value, abs=0.2)
    assert copies.high - copies.low > 0.5 * (once.high - once.low)


def test_few_prompts_give_a_figure_without_an_interval():
    found = agreement([1, 2, 3, 4], [1, 2, 3, 4], ["a", "a", "b", "b"]).kendall
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_nothing_at_all_is_undefined():
    found = agreement([], [], [])
    assert (found.n, found.kendall.value, found.within_spearman.value, found.tied_pairs) == (0, None, None, None)
    assert retest([], [], []).sd.value is None
    assert order([], [], [], [], []).excess.value is None
    assert mean([], []).value is None


def test_retest_measures_the_noise_that_was_added():
    rng = np.random.default_rng(0)
    quality = rng.uniform(size=400)
    first, second = quality + rng.normal(0, 0.1, (2, 400))
    found = retest(first, second, np.repeat(range(40), 10))
    assert found.sd.low <= 0.1 <= found.sd.high
    assert found.largest == pytest.approx(np.abs(first - second).max())
    assert 0 < found.flips.value < 0.3


def test_a_turned_group_is_all_flips_and_an_unchanged_one_has_none():
    assert retest([1, 2, 3], [3, 2, 1], "aaa").flips.value == 1.0
    assert retest([1, 2, 3], [1, 2, 3], "aaa").flips.value == 0.0
    assert retest([1, 1, 1], [3, 2, 1], "aaa").flips.value is None  # nothing was told apart the first time


def test_order_finds_what_a_place_is_worth():
    rng = np.random.default_rng(0)
    size, groups = 5, np.repeat(range(30), 5)
    before = np.tile(np.arange(size), 30) / (size - 1)
    after = np.concatenate([rng.permutation(size) for _ in range(30)]) / (size - 1)
    quality = rng.uniform(size=len(groups))
    places = list(zip(before, after, strict=True))
    fair = order(quality, quality, quality, places, groups)
    assert (fair.to_front.value, fair.excess.value) == (0.0, 0.0)
    biased = order(quality - 0.3 * before, quality - 0.3 * before, quality - 0.3 * after, places, groups)
    assert biased.to_front.value == pytest.approx(0.3)
    assert biased.excess.low > 0
    first, *_, last = biased.by_position
    assert first > 0.05
    assert last < -0.05


@given(st.lists(values, min_size=1, max_size=7))
def test_chance_counts_the_signs_that_give_as_large_a_sum(numbers):
    sums = [sum(v * s for v, s in zip(numbers, signs, strict=True)) for signs in product((1, -1), repeat=len(numbers))]
    assert chance(numbers) == pytest.approx(sum(each >= sum(numbers) for each in sums) / len(sums))


def test_chance_of_many_values_is_sampled_and_near_what_the_normal_distribution_says():
    rng = np.random.default_rng(0)
    numbers = rng.normal(0.4, 1, 40)
    z = numbers.sum() / math.sqrt((numbers**2).sum())
    assert chance(numbers) == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, abs=0.02)
    assert chance(np.ones(40)) == 1 / 4096


def test_many_prompts_are_resampled_by_blocks_and_the_figures_stay(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    groups = [k // 2 for k in range(400)]
    one_by_one = agreement(x, y, groups)
    monkeypatch.setattr(statistics, "MOST_BLOCKS", 50)
    by_block = agreement(x, y, groups)
    assert by_block.num_groups == one_by_one.num_groups == 200
    for name in ("kendall", "spearman"):
        exact, block = getattr(one_by_one, name), getattr(by_block, name)
        assert block.value == pytest.approx(exact.value)
        assert block.high - block.low == pytest.approx(exact.high - exact.low, rel=0.3)
    assert by_block.within_tau == one_by_one.within_tau
    assert by_block.within_kendall == one_by_one.within_kendall


def test_thousands_of_prompts_do_not_make_tables_of_all_their_pairs():
    n = 2000
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        agreement(rng.normal(size=n), rng.normal(size=n), range(n))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 150e6  # 104e6; with tables of all prompts by all prompts, 192e6 and more
