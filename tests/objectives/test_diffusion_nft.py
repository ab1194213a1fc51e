"""DiffusionNFT's loss against arXiv 2509.16117, transcribed in the paper's order of operations, in float64."""

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.flow_of_points import (
    STAGE,
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

from reasonrl.loop import Learner, train
from reasonrl.objectives import DiffusionNFT
from reasonrl.rollout import rollouts
from reasonrl.testing import check_objective

moderate = settings(max_examples=40, deadline=None)


def published(x_t, t, clean, live, old, advantage, *, beta, most):
    """One point's loss: both implicit velocities, where they say the clean latent is, and normalised squares."""
    r = min(max(advantage / (2 * most) + 0.5, 0.0), 1.0)
    total = 0.0
    for share, v in ((r, beta * live + (1 - beta) * old), (1 - r, (1 + beta) * old - beta * live)):
        predicted = x_t - t * v
        weight = (predicted - clean).abs().mean().detach().clamp(min=1e-5)
        total = total + share * (predicted - clean).square().mean() / weight
    return total * most / beta


@st.composite
def cases(draw):
    num, length = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 10_000))
    mask = torch.rand(num, length, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[0, 0] = True
    return stage(mask, shape=draw(st.sampled_from([(2,), (2, 3, 3)])), seed=seed), seed


@moderate
@given(cases(), st.sampled_from([0.1, 1.0, 2.0]), st.sampled_from([0.5, 5.0]), st.sampled_from([0.0, 0.3]))
def test_loss_and_gradient_are_the_papers(case, beta, most, kl):
    given_stage, seed = case
    objective = DiffusionNFT(beta=beta, most=most, kl=kl)
    prepared = objective.prepare(given_stage)
    live, old, reference = velocities(prepared, 3, seed=seed)
    frozen = {"old": saying(old.detach()), "reference": saying(reference.detach())}
    found = objective.loss(prepared, saying(live), frozen)
    expected = 0.0
    for i, t in prepared.mask.nonzero().tolist():
        expected = expected + published(
            prepared.context["noised"][i, t],
            prepared.context["times"][i, t],
            given_stage.context["clean"][i],
            live[i, t],
            old[i, t].detach(),
            float(given_stage.advantages[i]),
            beta=beta,
            most=most,
        )
        expected = expected + kl * (live[i, t] - reference[i, t].detach()).square().mean()
    assert_same(found.total, expected, live)
    assert ("kl" in found.metrics) == bool(kl)


def slope(objective, prepared, live, old):
    live = live.detach().requires_grad_()
    found = objective.loss(prepared, saying(live), {"old": saying(old)})
    return torch.autograd.grad(found.total, live)[0]


@moderate
@given(cases(), st.sampled_from([0.1, 1.0, 2.0]))
def test_at_the_old_policy_the_slope_is_that_of_regression_times_minus_the_advantage(case, beta):
    given_stage, seed = case
    objective = DiffusionNFT(beta=beta)
    prepared = objective.prepare(given_stage)
    (old,) = velocities(prepared, 1, seed=seed)
    found = slope(objective, prepared, old, old.detach())
    error = prepared.context["target"] - old.detach()
    time = prepared.context["times"]
    inner = tuple(range(2, error.ndim))
    weight = time * error.abs().mean(inner)
    size = error[0, 0].numel()
    factor = 2 * given_stage.advantages[:, None] * time.square() / (size * weight)
    expected = -factor.reshape(*factor.shape, *[1] * len(inner)) * error
    expected[~prepared.mask] = 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_draw_of_advantage_0_has_no_slope_at_the_old_policy_and_mirrored_slopes_beside_it():
    everything = torch.ones(2, 3, dtype=torch.bool)
    given_stage = stage(everything, shape=(2, 3, 3), advantages=torch.zeros(2, dtype=torch.float64))
    objective = DiffusionNFT(beta=0.7)
    prepared = objective.prepare(given_stage)
    old, away = (v.detach() for v in velocities(prepared, 2))
    assert slope(objective, prepared, old, old).abs().max() < 1e-12
    right, left = (slope(objective, prepared, old + side * 0.1 * away, old) for side in (1, -1))
    torch.testing.assert_close(right, -left, rtol=1e-10, atol=1e-10)
    # r = 1/2: A_max t / D × [(e + β t δ) / w⁻ − (e − β t δ) / w⁺], with e and w of the clean latent.
    time = prepared.context["times"][:, :, None, None, None]
    e, moved = time * (prepared.context["target"] - old), 0.7 * time * 0.1 * away
    plus, minus = ((e + sign * moved).abs().mean((2, 3, 4), keepdim=True) for sign in (-1, 1))
    expected = 5.0 * time / 18 * ((e + moved) / minus - (e - moved) / plus)
    torch.testing.assert_close(right, expected, rtol=1e-10, atol=1e-10)


def test_between_equal_errors_advantage_0_pulls_back_to_the_old_policy():
    given_stage = stage(torch.ones(1, 1, dtype=torch.bool), advantages=torch.zeros(1, dtype=torch.float64))
    objective = DiffusionNFT(beta=0.5)
    prepared = objective.prepare(given_stage)
    old = prepared.context["target"] - 1.0  # e = (t, t)
    away = torch.tensor([0.2, -0.2], dtype=torch.float64)  # keeps the mean error of both sides
    time = prepared.context["times"].item()
    found = slope(objective, prepared, old + away, old)[0, 0]
    torch.testing.assert_close(found, 2 * 5.0 * 0.5 * time**2 * away / (2 * time), rtol=1e-10, atol=1e-10)


def test_the_old_policy_follows_its_decay():
    objective = DiffusionNFT(decay_rate=0.25, decay_most=0.5)
    assert [objective.decay(i) for i in range(4)] == [0, 0.25, 0.5, 0.5]
    assert [DiffusionNFT().decay(i) for i in (0, 100, 5000)] == [0, 0.1, 0.5]
    asked = recipe(objective, steps=4, group_size=4, sample_with={STAGE: "old"})
    learner = Learner.of(asked)
    (weights,) = learner.weights.values()
    expected = [p.detach().clone() for p in weights.live]
    seen = []

    def observe(event, step, **facts):
        if event != "step_end":
            return
        decay = (0, 0.25, 0.5, 0.5)[step]
        for mine, live, copy in zip(expected, weights.live, weights.copies["old"], strict=True):
            mine.mul_(decay).add_((1 - decay) * live.detach())
            torch.testing.assert_close(copy, mine)
        gaps = [(c - p.detach()).abs().max() for c, p in zip(weights.copies["old"], weights.live, strict=True)]
        seen.append(max(gaps).item())

    train(asked, rollouts(asked, asked.prompts), learner=learner, observe=observe)
    assert seen[0] == 0
    assert min(seen[1:]) > 1e-4


def test_live_old_and_reference_weights_replay_the_same_points():
    policy = Points()
    asked = recipe(DiffusionNFT(kl=0.1), policy=policy, steps=2, group_size=4)
    train(asked, rollouts(asked, asked.prompts))
    first, second = policy.replayed[:3], policy.replayed[3:]
    for step in (first, second):
        assert len(step) == 3
        assert all(torch.equal(a, b) for other in step[1:] for a, b in zip(step[0], other, strict=True))
    assert not torch.equal(first[0][1], second[0][1])


@pytest.mark.parametrize(
    "how",
    [{"num_rows": 3}, {"num_actions": 1}, {"num_rows": 5, "num_actions": 2}, {"parts": (slice(0, 8), slice(8, None))}],
)
def test_micro_batches_windows_and_processes_leave_the_gradient_alone(how):
    asked = recipe(DiffusionNFT(kl=0.1), policy=Points(dtype=torch.float64), steps=1, group_size=4)
    rows = rows_of(asked)
    torch.testing.assert_close(
        gradient(asked, rows, moved=0.01, **how), gradient(asked, rows, moved=0.01), rtol=1e-10, atol=1e-10
    )


def spoiled(trajectory, member, latent):
    if trajectory.member != (member,):
        return trajectory
    segment = trajectory.segments[STAGE]
    context = {**segment.context, "clean": torch.full_like(segment.context["clean"], latent)}
    return evolve(trajectory, segments={STAGE: evolve(segment, context=context)})


def test_unscored_rows_contribute_nothing():
    judge = Rightmost(unscored=frozenset({2}))
    asked = recipe(DiffusionNFT(), policy=Points(dtype=torch.float64), judge=judge, steps=1, group_size=4)
    expected = gradient(asked, rows_of(asked), moved=0.01)
    assert expected.abs().max() > 0
    for latent in (1e6, float("nan")):
        rows = rows_of(asked, spoil=lambda t, latent=latent: spoiled(t, 2, latent))
        assert torch.equal(gradient(asked, rows, moved=0.01), expected)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"most": 0}, {"kl": -1}, {"decay_most": 1}, {"times": "often"}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionNFT(**settings)


@pytest.mark.parametrize("objective", [DiffusionNFT(), DiffusionNFT(kl=0.1, scale="batch_std", decay_most=0)])
def test_the_contract_is_kept(objective):
    check_objective(objective)


def test_a_flow_learns_the_preferred_mode():
    before, after = learned(DiffusionNFT(), sample_with={STAGE: "old"})
    assert before < 0.65
    assert after > 0.9
