import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import ConfigError, ContractError
from reasonrl.gaussian import guard_log_ratio, kl_means, kl_velocities, log_density, log_ratio
from reasonrl.noise import normal
from reasonrl.renderers.steps import CPS, DanceSDE, FlowSDE, replay, step

moderate = settings(max_examples=60, deadline=None)
F64 = torch.float64
etas = st.floats(0.05, 1.0)
seeds = st.integers(0, 2**32)


@st.composite
def falling(draw):
    """Two times of a flow step, s > s'; Flow-SDE's noise is unbounded just below 1, where schedules have no time."""
    s = draw(st.just(1.0) | st.floats(0.02, 0.999))
    return s, s * draw(st.floats(0.05, 0.98))


def drawn(seed, *shape, dtype=F64):
    return normal([seed], *shape)[0].to(dtype)


def latents(seed, *shape, dtype=F64):
    """x, v and noise, each of one shape."""
    return [drawn(seed + i, *shape, dtype=dtype) for i in range(3)]


def two_models(seed, kernel, times, *, reduce="mean", far=0.1):
    """The step of an old prediction, and what a prediction that has moved says of it."""
    x, v, noise = latents(seed, 3, 4, 2)
    old = step(kernel, x, v, *times, noise, reduce=reduce)
    moved = v + far * drawn(seed + 7, 3, 4, 2)
    return old, replay(kernel, x, moved, *times, old.next, reduce=reduce), noise


@moderate
@given(falling(), etas, seeds, st.sampled_from(["sum", "mean"]), st.sampled_from([FlowSDE, DanceSDE, CPS]))
def test_the_log_ratio_of_means_is_that_of_log_probs(times, eta, seed, reduce, kind):
    old, new, _ = two_models(seed, kind(eta), times, reduce=reduce, far=0.01)
    found = log_ratio(new.mean, old.mean, new.std, old.next, reduce=reduce)
    torch.testing.assert_close(found, new.log_prob - old.log_prob, rtol=1e-5, atol=1e-8)


@moderate
@given(falling(), etas, seeds, st.sampled_from(["sum", "mean"]), st.sampled_from([FlowSDE, DanceSDE, CPS]))
def test_the_corrected_ratio_is_the_papers_and_needs_only_the_noise(times, eta, seed, reduce, kind):
    old, new, noise = two_models(seed, kind(eta), times, reduce=reduce, far=0.01)
    found = guard_log_ratio(new.mean, old.mean, new.std, old.next, reduce=reduce)
    moved = new.mean - old.mean
    over = {"sum": lambda t: t.flatten(1).sum(1), "mean": lambda t: t.flatten(1).mean(1)}[reduce]
    b = old.std
    raw = new.log_prob - old.log_prob  # as given in GRPO-Guard: the raw log-ratio times b, plus moved^2 / 2b
    torch.testing.assert_close(found, raw * b + over(moved**2) / (2 * b), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found, over(noise * moved), rtol=1e-7, atol=1e-9)


def test_raw_ratios_drift_down_and_corrected_ones_do_not():
    """10,000 rows: within 5 standard errors of -u^2 / 2 and of 0, and the two are that far apart."""
    n = 10_000
    x, v, noise = latents(11, n, 4)
    old = step(FlowSDE(), x, v, 0.2, 0.1, noise)
    new = replay(FlowSDE(), x, v + 0.3, 0.2, 0.1, old.next)
    u = ((new.mean - old.mean) / old.std)[0, 0].item()
    raw = log_ratio(new.mean, old.mean, old.std, old.next)
    guard = guard_log_ratio(new.mean, old.mean, old.std, old.next)
    assert abs(raw.mean().item() + u**2 / 2) < 5 * raw.std().item() / math.sqrt(n)
    assert raw.mean().item() < -5 * raw.std().item() / math.sqrt(n)
    assert abs(guard.mean().item()) < 5 * guard.std().item() / math.sqrt(n)
    likelihood = log_ratio(new.mean, old.mean, old.std, old.next, reduce="sum").exp()
    assert abs(likelihood.mean().item() - 1) < 5 * likelihood.std().item() / math.sqrt(n), (
        "a likelihood ratio averages 1"
    )


def test_ratios_pass_the_gradient_to_the_new_mean_alone():
    mean, old, x_next = (drawn(i, 2, 3).requires_grad_(True) for i in range(3))
    std = torch.tensor(0.5, dtype=F64)
    for ratio in (log_ratio, guard_log_ratio):
        gradients = torch.autograd.grad(ratio(mean, old, std, x_next).sum(), (mean, old, x_next), allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1] is gradients[2] is None


def test_at_large_sums_ratios_of_means_keep_what_differences_of_log_probs_lose():
    x, v, noise = latents(13, 2, 16, 64, 64)
    moved = v + 1e-6 * drawn(20, *v.shape)
    exact_old = step(FlowSDE(), x, v, 0.8, 0.7, noise, reduce="sum")
    exact = log_ratio(
        FlowSDE().moments(x, moved, 0.8, 0.7)[0], exact_old.mean, exact_old.std, exact_old.next, reduce="sum"
    )
    old = step(FlowSDE(), x.float(), v.float(), 0.8, 0.7, noise.float(), reduce="sum")
    new = replay(FlowSDE(), x.float(), moved.float(), 0.8, 0.7, old.next, reduce="sum")
    by_means = log_ratio(new.mean, old.mean, old.std, old.next, reduce="sum")
    lost = (new.log_prob - old.log_prob - exact).abs().max()
    kept = (by_means - exact).abs().max()
    assert kept < 1e-3
    assert lost > 2 * kept


@moderate
@given(falling(), etas, seeds, st.sampled_from([FlowSDE, DanceSDE, CPS]))
def test_divergences_are_zero_at_equality_positive_elsewhere_and_one_is_the_others_multiple(times, eta, seed, kind):
    kernel = kind(eta)
    x, v, _ = latents(seed, 3, 4)
    other = v + 0.1 * drawn(seed + 5, 3, 4)
    mean, std = kernel.moments(x, v, *times)
    other_mean, _ = kernel.moments(x, other, *times)
    assert torch.equal(kl_means(mean, mean, std), torch.zeros(3, dtype=F64))
    assert torch.equal(kl_velocities(v, v), torch.zeros(3, dtype=F64))
    assert (kl_velocities(other, v) > 0).all()
    divergence = kl_means(mean, other_mean, std, reduce="sum")
    assert (divergence >= 0).all()
    b = kernel.coefficients(*torch.tensor([[t] for t in times], dtype=F64))[1].item()
    expected = kl_velocities(v, other, reduce="sum") * b**2 / (2 * std**2)
    torch.testing.assert_close(divergence, expected, rtol=1e-6, atol=1e-9)


def test_the_divergence_of_means_is_torchs():
    mean, other, _ = latents(3, 2, 5)
    std = torch.tensor([[0.3], [0.7]], dtype=F64)
    torchs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    )
    torch.testing.assert_close(kl_means(mean, other, std, reduce="sum"), torchs.sum(1))
    torch.testing.assert_close(kl_means(mean, other, std), torchs.mean(1))


@moderate
@given(falling(), etas, seeds)
def test_with_its_step_size_the_divergence_is_flow_grpos(times, eta, seed):
    s, s_next = times
    x, v, _ = latents(seed, 3, 4)
    kernel = DanceSDE(eta)
    mean, std = kernel.moments(x, v, s, s_next)
    other, _ = kernel.moments(x, v + 0.1, s, s_next)
    expected = ((mean - other) ** 2).mean(1) / (2 * eta**2)  # g = eta, and no |d|
    torch.testing.assert_close(kl_means(mean, other, std, step_size=s - s_next), expected)
    rows = torch.full((3,), s - s_next, dtype=F64)
    torch.testing.assert_close(kl_means(mean, other, std, step_size=rows), expected)


def test_the_log_density_is_torchs_and_its_gradient_is_the_means_alone():
    mean, x, _ = (t.requires_grad_(True) for t in latents(5, 2, 3))
    std = torch.tensor([[0.3], [0.7]], dtype=F64)
    torchs = torch.distributions.Normal(mean.detach(), std).log_prob(x.detach())
    torch.testing.assert_close(log_density(x, mean, std, reduce="sum"), torchs.sum(1))
    torch.testing.assert_close(log_density(x, mean, std), torchs.mean(1))
    of_mean, of_x = torch.autograd.grad(log_density(x, mean, std, reduce="sum").sum(), (mean, x), allow_unused=True)
    torch.testing.assert_close(of_mean, ((x - mean) / std**2).detach())
    assert of_x is None


def test_what_has_no_density_or_no_size_is_refused_in_one_line():
    mean, other, x = latents(3, 2, 5)
    none, some = torch.zeros(2, 1, dtype=F64), torch.tensor([[0.0], [1.0]], dtype=F64)
    one = torch.ones((), dtype=F64)
    cases = {
        "a step of std 0 has no density": lambda: log_ratio(mean, other, none, x),
        "a step of std 0 has no density, so": lambda: log_density(x, mean, none),
        "1 of 2 rows have a density and the others have std 0": lambda: kl_means(mean, other, some),
        r"step_size is one number or \(2,\), one a row, got \(3,\)": lambda: kl_means(
            mean, other, one, step_size=torch.ones(3)
        ),
    }
    for message, attempt in cases.items():
        with pytest.raises(ContractError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match='must be "sum" or "mean", got \'max\''):
        log_ratio(mean, other, one, x, reduce="max")
