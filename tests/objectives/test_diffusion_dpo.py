"""Diffusion-DPO's loss against equation 14 of arXiv 2311.12908, transcribed in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.flow_of_points import (
    Points,
    Rightmost,
    assert_same,
    gradient,
    learned,
    recipe,
    rows_of,
    saying,
    stage,
    velocities,
)

from reasonrl.objectives import DiffusionDPO
from reasonrl.testing import check_objective
from reasonrl.types import Rewards

moderate = settings(max_examples=40, deadline=None)


def rewards(values, groups=None):
    unscored = [v is None for v in values]
    return Rewards(
        ("r",),
        torch.tensor([[v or 0.0 for v in values]], dtype=torch.float64),
        ~torch.tensor([unscored]),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(len(values), dtype=torch.long) if groups is None else torch.tensor(groups),
    )


def equation_14(better, worse, *, beta):
    """One pair's loss at one time; each side is (target, live, reference)."""
    gains = [(v - target).square().mean() - (ref - target).square().mean() for target, v, ref in (better, worse)]
    return -torch.log(torch.sigmoid(-beta / 2 * (gains[0] - gains[1])))


@st.composite
def cases(draw):
    values = draw(st.lists(st.sampled_from([0.0, 0.3, 0.1 + 0.2, 1.0]), min_size=2, max_size=5))
    groups = draw(st.lists(st.integers(0, 1), min_size=len(values), max_size=len(values)))
    seed, length = draw(st.integers(0, 10_000)), draw(st.integers(1, 3))
    return values, groups, seed, length, draw(st.sampled_from([(2,), (2, 3, 3)]))


@moderate
@given(cases(), st.sampled_from(["extremes", "all"]), st.sampled_from([0.5, 4.0]))
def test_loss_and_gradient_are_the_papers_with_each_action_bearing_the_mean_of_its_pairs(case, pairs, beta):
    values, groups, seed, length, shape = case
    objective = DiffusionDPO(beta=beta, pairs=pairs)
    advantages, takes_part = objective.advantages(rewards(values, groups))
    mask = takes_part[:, None] & (torch.rand(len(values), length, generator=torch.Generator().manual_seed(seed)) < 0.8)
    given_stage = stage(mask, shape=shape, advantages=advantages.double(), groups=torch.tensor(groups), seed=seed)
    prepared = objective.prepare(given_stage)
    live, reference = velocities(prepared, 2, seed=seed)
    found = objective.loss(prepared, saying(live), {"reference": saying(reference.detach())})

    def side(i, t):
        return prepared.context["target"][i, t], live[i, t], reference[i, t].detach()

    chosen = expected_pairs(values, groups, pairs)
    expected = 0.0 * live.sum()
    for t in range(length):
        usable = [(i, j) for i, j in chosen if mask[i, t] and mask[j, t]]
        for row in range(len(values)):
            mine = [equation_14(side(i, t), side(j, t), beta=beta) for i, j in usable if row in (i, j)]
            expected = expected + sum(mine) / max(1, len(mine))
    assert_same(found.total + 0.0 * live.sum(), expected, live)


def expected_pairs(values, groups, pairs):
    """Returns (better, worse) rows; 0.1 + 0.2 and 0.3 are one reward."""
    level = [round(v, 3) for v in values]
    members = {g: [level[i] for i in range(len(values)) if groups[i] == g] for g in groups}
    return [
        (i, j)
        for i in range(len(values))
        for j in range(len(values))
        if groups[i] == groups[j]
        and level[i] > level[j]
        and (pairs == "all" or (level[i] == max(members[groups[i]]) and level[j] == min(members[groups[i]])))
    ]


@moderate
@given(st.sampled_from(["extremes", "all"]), st.integers(2, 5), st.integers(1, 3))
def test_at_the_reference_the_loss_is_log_2(pairs, num, length):
    objective = DiffusionDPO(pairs=pairs)
    advantages, takes_part = objective.advantages(rewards([float(i) for i in range(num)]))
    mask = takes_part[:, None].expand(num, length).clone()
    prepared = objective.prepare(stage(mask, advantages=advantages))
    (live,) = velocities(prepared, 1)
    found = objective.loss(prepared, saying(live), {"reference": saying(live.detach())})
    assert (found.total / objective.count(mask)).item() == pytest.approx(math.log(2), rel=1e-12)
    assert found.metrics["accuracy"].item() == 0


@pytest.mark.parametrize(("row", "sign"), [(1, -1), (0, 1)])
def test_the_loss_falls_when_the_better_ones_error_falls_and_when_the_worse_ones_rises(row, sign):
    objective = DiffusionDPO(beta=10.0)
    advantages, _ = objective.advantages(rewards([0.0, 1.0]))
    prepared = objective.prepare(stage(torch.ones(2, 1, dtype=torch.bool), advantages=advantages))
    (reference,) = (v.detach() for v in velocities(prepared, 1))
    losses = []
    for step in (0.0, 0.1, 0.2):
        live = reference.clone()
        live[row] += sign * step * (reference[row] - prepared.context["target"][row])
        losses.append(objective.loss(prepared, saying(live), {"reference": saying(reference)}).total.item())
    assert losses[0] > losses[1] > losses[2]


def test_extremes_are_all_that_tie_for_best_and_worst():
    advantages, takes_part = DiffusionDPO().advantages(rewards([0.3, 1.0, 0.1 + 0.2, 0.5, None, 1.0]))
    assert advantages.tolist() == [-1, 1, -1, 0, 0, 1]
    assert takes_part.tolist() == [True, True, True, False, False, True]


def test_standings_count_who_is_beaten():
    advantages, takes_part = DiffusionDPO(pairs="all").advantages(rewards([0.0, 1.0, 0.5, 0.5, None]))
    torch.testing.assert_close(advantages, torch.tensor([-1, 1, 0, 0, 0.0]))
    assert takes_part.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("pairs", ["extremes", "all"])
def test_a_group_of_equals_or_of_one_scored_draw_takes_no_part(pairs):
    for values in ([0.1 + 0.2, 0.3], [1.0, None]):
        advantages, takes_part = DiffusionDPO(pairs=pairs).advantages(rewards(values))
        assert not advantages.any()
        assert not takes_part.any()


@pytest.mark.parametrize("pairs", ["extremes", "all"])
@pytest.mark.parametrize("how", [{"num_rows": 3}, {"num_actions": 1}, {"parts": (slice(0, 8), slice(8, None))}])
def test_micro_batches_windows_and_processes_leave_the_gradient_alone(pairs, how):
    objective = DiffusionDPO(beta=5.0, pairs=pairs)
    judge = Rightmost(unscored=frozenset({0}))
    asked = recipe(objective, policy=Points(dtype=torch.float64), judge=judge, steps=1, group_size=4)
    rows = rows_of(asked)
    expected = gradient(asked, rows, moved=0.01)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(asked, rows, moved=0.01, **how), expected, rtol=1e-10, atol=1e-10)


def test_unscored_rows_contribute_nothing():
    judge = Rightmost(unscored=frozenset({0}))
    asked = recipe(DiffusionDPO(beta=5.0), policy=Points(dtype=torch.float64), judge=judge, steps=1, group_size=4)
    rows = rows_of(asked)
    scored = [row for row in rows if row.trajectory.member != (0,)]
    assert len(scored) == 12
    found = gradient(asked, scored, moved=0.01)
    torch.testing.assert_close(gradient(asked, rows, moved=0.01), found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"pairs": "some"}, {"tolerance": -1}, {"times": "often"}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionDPO(**settings)


@pytest.mark.parametrize("objective", [DiffusionDPO(), DiffusionDPO(pairs="all", beta=1.0)])
def test_the_contract_is_kept(objective):
    check_objective(objective)


@pytest.mark.parametrize("pairs", ["extremes", "all"])
def test_a_flow_learns_the_preferred_mode(pairs):
    before, after = learned(DiffusionDPO(beta=1.0, pairs=pairs), learning_rate=5e-3)
    assert before < 0.65
    assert after > 0.9


def test_a_pair_is_compared_at_one_time_and_with_one_noise():
    given_stage = stage(torch.ones(2, 3, dtype=torch.bool))
    context = DiffusionDPO().prepare(given_stage).context
    noise = context["target"] + torch.stack(given_stage.context["clean"])[:, None]
    assert torch.equal(context["times"][0], context["times"][1])
    torch.testing.assert_close(noise[0], noise[1])
