"""GRPO's loss against equation 3 of DeepSeekMath (arXiv 2402.03300), transcribed in plain floats."""

import math

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.objectives import GRPO, Supervised
from reasonrl.testing import check_objective
from reasonrl.types import Replay, Rewards, Stage

moderate = settings(max_examples=60, deadline=None)


def stage(mask, advantages, old):
    num, length = mask.shape
    return Stage(
        "image",
        tuple((str(i), (0,)) for i in range(num)),
        actions=torch.zeros(num, length, dtype=torch.long),
        present=torch.ones_like(mask),
        mask=mask,
        advantages=advantages,
        groups=torch.zeros(num, dtype=torch.long),
        log_probs=old,
    )


def equation_3(live, old, reference, advantage, *, low, high, kl):
    """One action's summand of equation 3 as a loss, with the estimate of the KL of equation 4."""
    ratio = math.exp(live - old)
    surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    divergence = math.exp(reference - live) - (reference - live) - 1
    return -(surrogate - kl * divergence)


@st.composite
def cases(draw):
    num, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    live, old, reference = (-3 * torch.rand(num, length, dtype=torch.float64) for _ in range(3))
    return live, old, reference, torch.randn(num, dtype=torch.float64), torch.rand(num, length) < 0.7


@moderate
@given(cases(), st.sampled_from([0.0, 0.04]), st.sampled_from([None, 0.28]))
def test_the_loss_is_the_sum_of_equation_3_over_trained_actions(case, kl, clip_high):
    live, old, reference, advantages, mask = case
    objective = GRPO(clip=0.2, clip_high=clip_high, kl=kl)
    frozen = {"reference": Replay(reference)} if kl else {}
    found = objective.loss(stage(mask, advantages, old), Replay(live, torch.ones_like(live)), frozen)
    expected = sum(
        equation_3(
            float(live[i, t]),
            float(old[i, t]),
            float(reference[i, t]),
            float(advantages[i]),
            low=0.2,
            high=clip_high or 0.2,
            kl=kl,
        )
        for i, t in mask.nonzero().tolist()
    )
    assert found.total.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert ("kl" in found.metrics) == bool(kl)


@moderate
@given(cases())
def test_actions_outside_the_mask_get_no_gradient(case):
    live, old, reference, advantages, mask = case
    live = live.clone().requires_grad_()
    loss = GRPO(kl=0.1).loss(
        stage(mask, advantages, old), Replay(live, torch.ones_like(live)), {"reference": Replay(reference)}
    )
    loss.total.backward()
    assert live.grad is not None
    assert not live.grad[~mask].any()


def test_the_first_update_is_reinforce_with_the_groups_baseline():
    live = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
    advantages = torch.tensor([1.5, -1.5])
    everything = torch.ones(2, 2, dtype=torch.bool)
    loss = GRPO().loss(stage(everything, advantages, live.detach()), Replay(live, torch.zeros(2, 2)), {})
    loss.total.backward()
    assert torch.equal(live.grad, -advantages[:, None].expand(2, 2))
    assert float(loss.metrics["ratio"]) == 4.0
    assert float(loss.metrics["clip_frac"]) == 0.0


def test_actions_without_a_recorded_log_prob_are_taken_as_drawn_by_the_live_weights():
    live = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    everything = torch.ones(1, 2, dtype=torch.bool)
    loss = GRPO().loss(stage(everything, torch.tensor([2.0]), None), Replay(live, torch.zeros(1, 2)), {})
    assert loss.total.item() == -4.0


def rewards(values):
    return Rewards(
        ("r",),
        torch.tensor([values], dtype=torch.float64),
        torch.ones(1, len(values), dtype=torch.bool),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(len(values), dtype=torch.long),
    )


def test_near_equal_rewards_say_nothing():
    advantages, taking_part = GRPO().advantages(rewards([0.1 + 0.2, 0.3]))
    assert advantages.tolist() == [0.0, 0.0]
    assert taking_part.all()


def test_dr_grpo_leaves_out_the_division():
    advantages, _ = GRPO(scale="none").advantages(rewards([0.0, 1.0]))
    assert advantages.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("settings", [{"clip": 0.0}, {"clip_high": -0.1}, {"kl": -1.0}, {"eps": 0.0}, {"scale": "iqr"}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GRPO(**settings)


@pytest.mark.parametrize("objective", [GRPO(), GRPO(kl=0.1, clip_high=0.28), GRPO(scale="none"), Supervised()])
def test_shipped_objectives_keep_the_contract(objective):
    check_objective(objective)


def test_supervision_is_the_negative_log_likelihood_of_the_masked_actions():
    live = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = Supervised().loss(stage(mask, torch.ones(2), None), Replay(live), {})
    assert loss.total.item() == 7.0
    loss.total.backward()
    assert torch.equal(live.grad, -mask.float())


@moderate
@given(cases(), st.floats(0.5, 5.0))
def test_actions_that_another_distribution_drew_weigh_by_a_truncated_ratio(case, most):
    live, old, drew, advantages, mask = case
    given_stage = evolve(stage(mask, advantages, old), behaviour=drew)
    found = GRPO(most_importance=most).loss(given_stage, Replay(live, torch.ones_like(live)), {})
    expected = sum(
        min(math.exp(float(old[i, t] - drew[i, t])), most)
        * equation_3(float(live[i, t]), float(old[i, t]), 0.0, float(advantages[i]), low=0.2, high=0.2, kl=0.0)
        for i, t in mask.nonzero().tolist()
    )
    assert found.total.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert found.metrics["importance"].item() <= most * mask.sum().item() + 1e-9


def test_untruncated_weights_make_the_gradient_that_of_the_trained_distribution():
    torch.manual_seed(0)
    words, reward = 6, torch.randn(6, dtype=torch.float64)
    logits = torch.randn(words, dtype=torch.float64, requires_grad=True)
    drew = torch.randn(words, dtype=torch.float64).log_softmax(0)
    on_policy = (logits.softmax(0) * reward).sum()
    (wanted,) = torch.autograd.grad(on_policy, logits)
    # Every word once, each loss weighted by the probability that it was drawn.
    live = logits.log_softmax(0)[:, None]
    every = stage(torch.ones(words, 1, dtype=torch.bool), drew.exp() * reward, live.detach())
    found = GRPO(most_importance=1e9).loss(
        evolve(every, behaviour=drew[:, None]), Replay(live, torch.ones_like(live)), {}
    )
    (slope,) = torch.autograd.grad(-found.total, logits)
    torch.testing.assert_close(slope, wanted)
