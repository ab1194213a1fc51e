"""Advantage-weighted regression, against the transcribed formulas of AWR and AWM, in float64."""

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

from reasonrl.objectives import AdvantageWeighted
from reasonrl.testing import check_objective

moderate = settings(max_examples=40, deadline=None)


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 10_000))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[0, 0] = True
    return stage(mask, shape=draw(st.sampled_from([(2,), (2, 3, 3)])), seed=seed), seed


@moderate
@given(cases(), st.sampled_from([0.3, 1.0]), st.sampled_from([1.5, 20.0]), st.sampled_from([0.0, 0.3]))
def test_the_exponential_form_is_awr(case, temperature, most, kl):
    given_stage, seed = case
    objective = AdvantageWeighted(temperature=temperature, most=most, kl=kl)
    prepared = objective.prepare(given_stage)
    live, reference = velocities(prepared, 2, seed=seed)
    found = objective.loss(prepared, saying(live), {"reference": saying(reference.detach())})
    expected = 0.0
    for i, t in prepared.mask.nonzero().tolist():
        weight = min(math.exp(float(given_stage.advantages[i]) / temperature), most)
        expected = expected + weight * (live[i, t] - prepared.context["target"][i, t]).square().mean()
        expected = expected + kl * (live[i, t] - reference[i, t].detach()).square().mean()
    assert_same(found.total, expected, live)


@moderate
@given(cases(), st.sampled_from([0.05, 0.2]))
def test_the_linear_form_has_awms_clipped_policy_gradient_where_weights_are_those_that_drew(case, clip):
    given_stage, seed = case
    objective = AdvantageWeighted(form="linear", most=100.0)
    prepared = objective.prepare(given_stage)
    (live,) = velocities(prepared, 1, seed=seed)
    surrogate = 0.0
    for i, t in prepared.mask.nonzero().tolist():
        log_prob = -(live[i, t] - prepared.context["target"][i, t]).square().mean()
        ratio, advantage = (log_prob - log_prob.detach()).exp(), given_stage.advantages[i]
        surrogate = surrogate - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    found = objective.loss(prepared, saying(live), {})
    one, other = (torch.autograd.grad(total, live)[0] for total in (found.total, surrogate))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_weights_are_clipped_on_both_sides():
    advantages = torch.tensor([-9.0, 0.0, 9.0])
    assert AdvantageWeighted(form="linear", most=2.0).weights(advantages).tolist() == [-2, 0, 2]
    found = AdvantageWeighted(most=2.0).weights(advantages)
    torch.testing.assert_close(found, torch.tensor([math.exp(-9), 1, 2]))


@pytest.mark.parametrize("form", ["exponential", "linear"])
@pytest.mark.parametrize("how", [{"num_rows": 3}, {"num_actions": 1}, {"parts": (slice(0, 8), slice(8, None))}])
def test_micro_batches_windows_and_processes_leave_the_gradient_alone(form, how):
    objective = AdvantageWeighted(form=form, kl=0.1)
    asked = recipe(objective, policy=Points(dtype=torch.float64), steps=1, group_size=4)
    rows = rows_of(asked)
    torch.testing.assert_close(gradient(asked, rows, **how), gradient(asked, rows), rtol=1e-10, atol=1e-10)


def test_unscored_rows_contribute_nothing():
    judge = Rightmost(unscored=frozenset({2}))
    asked = recipe(AdvantageWeighted(), policy=Points(dtype=torch.float64), judge=judge, steps=1, group_size=4)
    rows = rows_of(asked)
    scored = [row for row in rows if row.trajectory.member != (2,)]
    assert len(scored) == 12
    torch.testing.assert_close(gradient(asked, rows), gradient(asked, scored), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{"form": "cubic"}, {"temperature": 0}, {"most": 0}, {"kl": -1}, {"shift": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdvantageWeighted(**settings)


@pytest.mark.parametrize("objective", [AdvantageWeighted(), AdvantageWeighted(form="linear", kl=0.1, scale="none")])
def test_the_contract_is_kept(objective):
    check_objective(objective)


@pytest.mark.parametrize("objective", [AdvantageWeighted(), AdvantageWeighted(form="linear", kl=0.5)])
def test_a_flow_learns_the_preferred_mode(objective):
    before, after = learned(objective)
    assert before < 0.65
    assert after > 0.9
