"""Advantages and policy loss: every backend against `reference`, and `reference` against plain Python."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.backends import DEVICE, each_backend, quiet, running

from reasonrl.errors import ContractError
from reasonrl.kernels import group_advantages, masked_aggregate, policy_loss, reference

pytestmark = quiet
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
LOW, HIGH = 0.2, 0.3


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def transcribed(gap, advantage, d, *, dual, kl):
    """One action's loss and its slope in ln π, in plain floats: PPO eq. 7, dual-clip PPO eq. 5, Schulman's k1 to k3."""
    ratio = math.exp(min(max(gap, -20), 20))
    bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
    loss, slope = -min(ratio * advantage, bounded * advantage), -ratio * advantage
    if bounded * advantage < ratio * advantage or abs(gap) > 20:
        slope = 0.0
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        loss, slope = -dual * advantage, 0.0
    value = {"k1": -d, "k2": d * d / 2, "k3": math.expm1(d) - d}[kl]
    tilt = {"k1": 1.0, "k2": -d, "k3": -math.expm1(d)}[kl]
    return loss + 0.5 * value, slope + 0.5 * tilt


@each_backend
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual", [None, 2.0])
def test_every_corner_of_the_clipped_loss_equals_the_papers(backend, kl, dual):
    gaps = [-1000.0, -1.0, math.log(1 - LOW), -0.1, 0.0, 0.1, math.log(1 + HIGH), 1.0, 1000.0]
    corners = list(itertools.product(gaps, [-2.0, 0.0, 1.5], [-0.5, -1e-5, 0.0, 1e-5, 0.029, 0.031, 0.5]))
    live = torch.zeros(len(corners), 1, device=DEVICE, requires_grad=True)
    gap, advantage, d = (torch.tensor(c, device=DEVICE)[:, None] for c in zip(*corners, strict=True))
    with running(backend):
        found = policy_loss(
            live, -gap, advantage[:, 0], torch.ones_like(gap, dtype=torch.bool), reference_log_prob=d,
            clip=(LOW, HIGH), dual_clip=dual, kl_coef=0.5, kl=kl, agg="const",
        )  # fmt: skip
    [slopes] = torch.autograd.grad(found.loss, [live])
    wanted = [transcribed(*corner, dual=dual, kl=kl) for corner in corners]
    on_the_edge = [abs(c[0] - math.log(1 - LOW)) < 1e-6 or abs(c[0] - math.log(1 + HIGH)) < 1e-6 for c in corners]
    for slope, (_, theirs), edge in zip(slopes[:, 0].tolist(), wanted, on_the_edge, strict=True):
        # At a bound, float32 decides the side; both are subgradients.
        assert edge or slope == pytest.approx(theirs, rel=2e-5, abs=2e-7)
    usual = [abs(c[0]) < 20 for c in corners]
    total = sum(loss for (loss, _), keep in zip(wanted, usual, strict=True) if keep)
    with running(backend):
        part = policy_loss(
            live, -gap, advantage[:, 0], torch.tensor(usual, device=DEVICE)[:, None], reference_log_prob=d,
            clip=(LOW, HIGH), dual_clip=dual, kl_coef=0.5, kl=kl, agg="const",
        )  # fmt: skip
    assert part.loss.item() == pytest.approx(total, rel=1e-5)


@each_backend
def test_a_tiny_divergence_is_not_rounding_noise(backend):
    live = torch.full((1, 2), -3.0, device=DEVICE)
    with running(backend):
        found = policy_loss(
            live, live, torch.zeros(1, device=DEVICE), torch.ones(1, 2, dtype=torch.bool, device=DEVICE),
            reference_log_prob=live + 2**-17, kl_coef=1.0,
        )  # fmt: skip
    assert found.loss.item() == pytest.approx(2**-35, rel=1e-4)


@each_backend
@few
@given(
    seeds,
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const"]),
)
def test_backends_agree_on_loss_slope_and_metrics(backend, seed, ratio, agg):
    live = random(3, 7, seed=seed).requires_grad_()
    wide = live.detach().double().requires_grad_()
    spread = random(3, 7, seed=seed + 5).abs().requires_grad_()
    old, anchor = live.detach() + random(3, 7, seed=seed + 1, scale=0.3), live.detach() + random(3, 7, seed=seed + 2)
    mask, advantages = random(3, 7, seed=seed + 3) > 0, random(3, seed=seed + 4)
    settings = {"clip": (LOW, HIGH), "kl_coef": 0.1, "entropy_coef": 0.01, "ratio": ratio, "agg": agg}
    with running(backend):
        found = policy_loss(live, old, advantages, mask, reference_log_prob=anchor, entropy=spread, **settings)
        slopes = torch.autograd.grad(found.loss * 3, [live, spread])
    agg = settings.pop("agg")
    terms = reference.policy_terms(
        wide, old.double(), advantages.double(), mask, reference=anchor.double(), entropy=spread.double(), **settings
    )
    wanted = reference.masked_aggregate(terms["loss"], mask, agg)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(slopes[0].double(), torch.autograd.grad(wanted * 3, [wide])[0], rtol=1e-4, atol=1e-6)
    assert not slopes[1][~mask].any()
    for name in ("surrogate", "ratio", "clip_low", "clip_high", "kl"):
        assert found.metrics[name].item() == pytest.approx(terms[name].sum().item(), rel=1e-4, abs=1e-5)
    assert found.metrics["entropy"].item() == pytest.approx(spread[mask].sum().item(), rel=1e-5)


def test_a_sequence_ratio_is_the_geometric_mean_and_each_token_carries_its_gradient():
    live = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    found = policy_loss(live, torch.tensor([[-1.1, -2.0, 0.0]]), torch.ones(1), mask, clip=(0.2, 0.2), ratio="sequence")
    assert found.loss.item() == pytest.approx(-math.exp(0.05))  # GSPO eq. 7
    assert torch.autograd.grad(found.loss, [live])[0].tolist() == [pytest.approx([-math.exp(0.05) / 2] * 2 + [0.0])]


@few
@given(seeds)
def test_aggregations_equal_loops_over_sequences(seed):
    values, mask = random(4, 5, seed=seed), random(4, 5, seed=seed + 1) > 0.3
    rows = [
        [v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    flat = [v for row in rows for v in row]
    full = [row for row in rows if row]
    wanted = {
        "token_mean": sum(flat) / max(len(flat), 1),
        "seq_mean_token_mean": sum(sum(r) / len(r) for r in full) / max(len(full), 1),
        "seq_mean_token_sum": sum(flat) / max(len(full), 1),
        "const": sum(flat),
    }
    for agg, value in wanted.items():
        assert masked_aggregate(values, mask, agg).item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert masked_aggregate(values, mask, agg, torch.tensor(8.0)).item() == pytest.approx(
            (sum(sum(r) / len(r) for r in full) if agg == "seq_mean_token_mean" else sum(flat)) / 8, rel=1e-5, abs=1e-6
        )


@each_backend
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_an_empty_batch_has_loss_and_gradient_zero(backend, shape):
    live = torch.zeros(shape, device=DEVICE, requires_grad=True)
    nothing = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    with running(backend):
        found = policy_loss(live, live - 1, torch.ones(shape[0], device=DEVICE), nothing)
    assert found.loss.item() == 0
    assert not torch.autograd.grad(found.loss, [live])[0].any()


@each_backend
@few
@given(
    seeds,
    st.sampled_from(["mean", "loo", "none"]),
    st.sampled_from(["std", "batch_std", "none"]),
    st.sampled_from([0.0, 20.1]),
)
def test_backends_agree_on_advantages(backend, seed, baseline, scale, offset):
    rewards = random(40, seed=seed, scale=0.01) + offset
    groups = torch.randint(6, (40,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rewards[groups == 2] = 0.3
    rewards[::7] = torch.nan
    with running(backend):
        found, counted = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    wide = rewards.double().cpu().tolist()
    for label in range(6):
        mine = [i for i in range(40) if groups[i] == label and not math.isnan(wide[i])]
        mean = sum(wide[i] for i in mine) / max(len(mine), 1)
        everyone = [r for r in wide if not math.isnan(r)]
        center = sum(everyone) / len(everyone)
        divisor = {
            "none": 1.0,
            "std": math.sqrt(sum((wide[i] - mean) ** 2 for i in mine) / max(len(mine) - 1, 1)) + 1e-4,
            "batch_std": math.sqrt(sum((r - center) ** 2 for r in everyone) / (len(everyone) - 1)) + 1e-4,
        }[scale]
        for i in mine:
            others = [wide[j] for j in mine if j != i]
            without = sum(others) / len(others) if others else wide[i]
            start = {"mean": mean, "loo": without, "none": 0.0}[baseline]
            same = (label == 2 or len(mine) == 1) and (baseline != "none" or scale == "std")
            assert found[i].item() == pytest.approx(0.0 if same else (wide[i] - start) / divisor, rel=1e-4, abs=1e-6)
            assert counted[i].item() == (len(mine) >= (1 if baseline == "none" else 2))
    assert not found[rewards.isnan()].any()
    assert not counted[rewards.isnan()].any()


@each_backend
def test_rewards_normalised_one_by_one_keep_their_weights(backend):
    rewards = torch.tensor([[0.0, 100.0], [1.0, 300.0], [0.5, 200.0], [0.1, 500.0]], device=DEVICE)
    shares = torch.tensor([2.0, 0.5], device=DEVICE)
    with running(backend):
        found, _ = group_advantages(rewards, 2, weights=shares, per_reward_norm=True, eps=0.0)
        plain, _ = group_advantages(rewards, 2, weights=shares, scale="none")
    half = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([-2.5 * half, 2.5 * half, 1.5 * half, -1.5 * half], rel=1e-5)
    assert plain.tolist() == pytest.approx([-51.0, 51.0, -74.6, 74.6], rel=1e-5)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: group_advantages(torch.zeros(5), 2), "5 rewards do not make whole groups of 2"),
        (lambda: group_advantages(torch.zeros(5, 1, 1), 1), r"rewards must be \(M,\) or \(M, K\), got \(5, 1, 1\)"),
        (lambda: group_advantages(torch.zeros(5), torch.zeros(4)), r"groups must be \(5,\) to fit rewards"),
        (lambda: loss(advantages=torch.zeros(3)), r"advantages must be \(N,\) or \(N, T\) of \(2, 3\), got \(3,\)"),
        (
            lambda: group_advantages(torch.zeros(4), 2, baseline="lo"),
            "baseline must be one of mean, loo, none, got 'lo'",
        ),
        (lambda: group_advantages(torch.zeros(4), 2, scale="stdd"), "scale must be one of std, batch_std, none, got"),
        (lambda: loss(agg="mean"), "agg must be one of token_mean, .*, got 'mean'"),
        (lambda: loss(kl="k4"), "kl must be one of k1, k2, k3, got 'k4'"),
        (lambda: loss(entropy=torch.zeros(3, 2)), r"entropy must be \(2, 3\) to fit log_prob"),
        (lambda: loss(mask=torch.ones(2, 3)), "mask must be bool"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(ask, said):
    with pytest.raises(ContractError, match=said):
        ask()


def loss(*, advantages=None, mask=None, **settings):
    mask = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask
    advantages = torch.zeros(2) if advantages is None else advantages
    return policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), advantages, mask, **settings)


# ---- found by review ----


@each_backend
@quiet
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_nan_log_prob_shows_in_the_loss_and_not_where_it_is_masked(backend, ratio):
    live = torch.zeros(2, 3, device=DEVICE)
    live[0, 1] = torch.nan
    mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    with running(backend):
        seen = policy_loss(live, torch.zeros_like(live), torch.ones(2, device=DEVICE), mask, ratio=ratio)
        mask[0, 1] = False
        hidden = policy_loss(live, torch.zeros_like(live), torch.ones(2, device=DEVICE), mask, ratio=ratio)
    assert seen.loss.isnan()
    assert hidden.loss.item() == pytest.approx(-1.0)


@each_backend
@quiet
def test_a_divergence_that_is_only_watched_does_not_train(backend):
    live = torch.full((1, 2), -999.0, device=DEVICE).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    with running(backend):
        found = policy_loss(
            live, live.detach(), torch.ones(1, device=DEVICE), mask, reference_log_prob=live.detach() * 0
        )
        (slope,) = torch.autograd.grad(found.loss, live)
    assert found.loss.item() == pytest.approx(-1.0)
    assert slope.tolist() == [[-0.5, -0.5]]
    assert "kl" in found.metrics


@each_backend
@pytest.mark.parametrize("agg", ["token_mean", "seq_mean_token_sum", "const"])
def test_an_empty_batch_divided_by_its_own_count_is_zero(backend, agg):
    live = torch.zeros(2, 3, device=DEVICE).requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    with running(backend):
        found = policy_loss(live, live.detach(), torch.ones(2, device=DEVICE), mask, agg=agg, denominator=mask.sum())
        (slope,) = torch.autograd.grad(found.loss, live)
    assert found.loss.item() == 0.0
    assert not slope.any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(backend, dtype):
    live, old = random(2, 5, seed=0).to(dtype), random(2, 5, seed=1).to(dtype)
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    advantages = random(2, seed=2).to(dtype)
    with running(backend):
        found = policy_loss(live, old, advantages, mask).loss
        far = policy_loss(live + 29, live, advantages * 0, mask).loss
    assert found.dtype == torch.float32
    wanted = policy_loss(live.double(), old.double(), advantages.double(), mask).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert far.item() == 0.0


def test_a_gradient_of_the_triton_loss_has_none_of_its_own():
    theta = torch.ones(1, 3, device=DEVICE).requires_grad_()
    with running("triton"):
        found = policy_loss(
            -theta.square(), -torch.ones_like(theta), torch.ones(1, device=DEVICE), torch.ones_like(theta).bool()
        )
        (slope,) = torch.autograd.grad(found.loss, theta, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(slope.sum(), theta)


@each_backend
def test_an_infinite_reward_leaves_its_group(backend):
    rewards = torch.tensor([0.0, 1.0, torch.inf, torch.nan], device=DEVICE)
    with running(backend):
        found, counted = group_advantages(rewards, 4, scale="none")
    assert found.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert counted.tolist() == [True, True, False, False]


@each_backend
def test_without_a_baseline_a_deviation_of_nothing_is_no_scale(backend):
    with running(backend):
        found, counted = group_advantages(torch.ones(4, device=DEVICE), 4, baseline="none")
    assert found.tolist() == [0.0] * 4
    assert counted.all()
