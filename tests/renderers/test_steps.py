import math

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import ConfigError, ContractError
from reasonrl.gaussian import guard_log_ratio, kl_means, log_ratio
from reasonrl.noise import normal
from reasonrl.renderers.steps import (
    CPS,
    DDIM,
    ODE,
    DanceSDE,
    FlowSDE,
    replay,
    sde_coefficients,
    step,
    steps_with_density,
)

moderate = settings(max_examples=60, deadline=None)
F64 = torch.float64
RANDOM = {
    "Flow-SDE": (FlowSDE(), 0.8, 0.6),
    "Flow-SDE from pure noise": (FlowSDE(), 1.0, 0.9),
    "Dance-SDE": (DanceSDE(), 0.8, 0.6),
    "CPS": (CPS(), 0.8, 0.6),
    "DDIM": (DDIM(), 0.3, 0.5),
}
"""A kernel, and the times of one step of it that has a density."""
random_kernels = pytest.mark.parametrize(("kernel", "s", "s_next"), RANDOM.values(), ids=RANDOM)
FLOW_KERNELS = (FlowSDE(), DanceSDE(), CPS(), ODE())

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


def gaussian(x, mean, std):
    """The normal's density, term by term as it is usually written; (N,) sums."""
    density = torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    return density.log().flatten(1).sum(1)


# ---- Formula parity: transcriptions in each paper's own notation, float64 ------------------------------


def flow_grpo(x_t, v, t, t_next, a, sigma_max):
    """As given in Flow-GRPO (arXiv 2505.05470): t runs from 1 to 0, its Delta t is t_next - t.

    dx = [v + sigma_t^2 / (2t) (x + (1-t) v)] dt + sigma_t dw,  sigma_t = a sqrt(t / (1-t)).
    """
    sigma_t = a * math.sqrt(t / (1 - (sigma_max if t == 1 else t)))
    dt = t_next - t
    mean = x_t + (v + sigma_t**2 / (2 * t) * (x_t + (1 - t) * v)) * dt
    return mean, sigma_t * math.sqrt(abs(dt))


def dance_grpo(z, u, sigma, sigma_next, epsilon):
    """As given in DanceGRPO (arXiv 2505.07818): dz = (u - epsilon^2 / 2 grad log p) dt + epsilon dw.

    The score of z = alpha x + sigma eps with alpha = 1 - sigma is -(z - alpha x) / sigma^2.
    """
    x_hat = z - sigma * u
    score = -(z - (1 - sigma) * x_hat) / sigma**2
    dt = sigma_next - sigma
    return z + (u - 0.5 * epsilon**2 * score) * dt, epsilon * math.sqrt(-dt)


def cps(x_t, v, t, t_next, eta):
    """As given in Coefficients-Preserving Sampling (arXiv 2509.05952): sigma = t' sin(eta pi / 2)."""
    x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
    sigma = t_next * math.sin(eta * math.pi / 2)
    return (1 - t_next) * x0_hat + math.sqrt(t_next**2 - sigma**2) * x1_hat, sigma


def ddim(x_t, eps, alpha, alpha_prev, eta):
    """As given in DDIM (arXiv 2010.02502), alpha the cumulative product; DDPO (arXiv 2305.13301) takes eta = 1."""
    sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
    predicted_x0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    direction = math.sqrt(1 - alpha_prev - sigma**2) * eps
    return math.sqrt(alpha_prev) * predicted_x0 + direction, sigma


def check_parity(kernel, times, expected, x, v, noise):
    """Means, stds, the next latents and log-probs against what a transcription says of mean and std."""
    mean, std = expected
    found = step(kernel, x, v, *times, noise, reduce="sum")
    # The transcriptions take roots of differences, which lose digits where eta is almost 1.
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.std.item(), std, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.next, mean + std * noise, rtol=1e-9, atol=1e-9)
    log_prob = gaussian(found.next, mean, std)
    torch.testing.assert_close(found.log_prob, log_prob, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(replay(kernel, x, v, *times, found.next).log_prob, log_prob / x[0].numel())


@moderate
@given(falling(), etas, seeds)
def test_flow_sde_is_the_papers_update(times, eta, seed):
    x, v, noise = latents(seed, 2, 3, 2)
    check_parity(FlowSDE(eta), times, flow_grpo(x, v, *times, eta, times[1]), x, v, noise)


@pytest.mark.parametrize("s_max", [None, 0.95])
def test_flow_sde_leaves_pure_noise_as_the_papers_code_does(s_max):
    x, v, noise = latents(3, 2, 3, 2)
    expected = flow_grpo(x, v, 1.0, 0.9, 0.7, s_max or 0.9)
    check_parity(FlowSDE(0.7, s_max), (1.0, 0.9), expected, x, v, noise)


def test_a_time_that_is_one_up_to_rounding_does_not_explode():
    x, v, _ = latents(3, 2, 3, 2)
    almost, std = FlowSDE().moments(x, v, 1 - 1e-9, 0.9)
    exact, exact_std = FlowSDE().moments(x, v, 1.0, 0.9)
    torch.testing.assert_close(almost, exact)
    torch.testing.assert_close(std, exact_std)


@moderate
@given(falling(), etas, seeds)
def test_dance_sde_is_the_papers_update(times, eta, seed):
    x, v, noise = latents(seed, 2, 3, 2)
    check_parity(DanceSDE(eta), times, dance_grpo(x, v, *times, eta), x, v, noise)


@moderate
@given(falling(), etas, seeds)
def test_cps_is_the_papers_update(times, eta, seed):
    x, v, noise = latents(seed, 2, 3, 2)
    check_parity(CPS(eta), times, cps(x, v, *times, eta), x, v, noise)


@moderate
@given(falling(), etas, seeds)
def test_ddim_is_the_papers_update(times, eta, seed):
    x, eps, noise = latents(seed, 2, 3, 2)
    alphas = (1 - times[0] * 0.99, 1 - times[1] * 0.99)  # alpha_bar rises, within (0, 1)
    check_parity(DDIM(eta), alphas, ddim(x, eps, *alphas, eta), x, eps, noise)


@moderate
@given(falling(), seeds)
def test_the_ode_step_is_eulers(times, seed):
    x, v, _ = latents(seed, 2, 3)
    s, s_next = times
    torch.testing.assert_close(ODE().moments(x, v, s, s_next)[0], x + (s_next - s) * v, rtol=0, atol=1e-15)


@moderate
@given(falling(), etas)
def test_dance_sde_is_flow_sde_with_another_g(times, eta):
    s, s_next = (torch.tensor(t, dtype=F64) for t in times)
    dance = DanceSDE(eta).coefficients(s, s_next)
    # Flow-SDE whose noise level undoes sqrt(s / (1 - s)) at this one time has the same g, so it is the same step.
    below = s_next if s == 1 else s
    flow = FlowSDE(eta / math.sqrt(s / (1 - below))).coefficients(s, s_next)
    torch.testing.assert_close(torch.stack(dance), torch.stack(flow), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dance, sde_coefficients(s, s_next, torch.tensor(eta, dtype=F64)), rtol=0, atol=0)


@moderate
@given(falling(), etas, st.sampled_from([FlowSDE, DanceSDE, CPS]), seeds)
def test_less_and_less_noise_is_the_ode(times, eta, kind, seed):
    x, v, noise = latents(seed, 2, 3)
    goal = step(ODE(), x, v, *times).next
    gaps = [(step(kind(eta * k), x, v, *times, noise).next - goal).abs().max() for k in (1e-3, 1e-6)]
    assert gaps[1] <= 2e-3 * gaps[0] + 1e-14, "the gap shrinks at least as fast as the noise"
    assert step(kind(0.0), x, v, *times).log_prob is None
    torch.testing.assert_close(step(kind(0.0), x, v, *times).next, goal, rtol=0, atol=1e-14)


@moderate
@given(falling(), seeds)
def test_ddim_without_noise_keeps_its_beliefs(times, seed):
    alpha, alpha_next = (1 - times[0] * 0.99, 1 - times[1] * 0.99)
    x0, eps, _ = latents(seed, 2, 3)
    x = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
    found = step(DDIM(0.0), x, eps, alpha, alpha_next)
    assert found.log_prob is None
    torch.testing.assert_close(found.next, math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * eps)


@moderate
@given(falling(), etas)
def test_cps_keeps_the_weights_of_data_and_of_noise(times, eta):
    s, s_next = times
    on_data, on_noise, std = weights_after(CPS(eta), s, s_next)
    assert on_data == pytest.approx(1 - s_next, abs=1e-12)
    assert math.hypot(on_noise, std) == pytest.approx(s_next, abs=1e-12)


def test_flow_sde_adds_noise_that_cps_does_not():
    """At eta 0.7 from 0.2 to 0.1 noise of 0.131 in the place of 0.1."""
    _, on_noise, std = weights_after(FlowSDE(0.7), 0.2, 0.1)
    assert math.hypot(on_noise, std) == pytest.approx(0.130625)


def weights_after(kernel, s, s_next):
    """The weights of x0 and eps in the mean, for a model that knows both, and the std of what is added."""
    x0, eps = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[0.0, 1.0]], dtype=F64)
    mean, std = kernel.moments((1 - s) * x0 + s * eps, eps - x0, s, s_next)
    return (*mean[0].tolist(), std.item())


# ---- The density is one, and of what is drawn --------------------------------------------------------


@random_kernels
def test_ten_thousand_draws_have_the_moments_of_the_density(kernel, s, s_next):
    """Within 4 standard errors: std / sqrt(n) of a mean, sqrt(2 / (n - 1)) of a relative variance; 4 numbers each."""
    n = 10_000
    x, v = (drawn(i, 1, 4).expand(n, 4) for i in (1, 2))
    found = step(kernel, x, v, s, s_next, drawn(3, n, 4))
    mean, std = found.mean[0], found.std.item()
    assert ((found.next.mean(0) - mean).abs() < 4 * std / math.sqrt(n)).all()
    assert ((found.next.var(0) / std**2 - 1).abs() < 4 * math.sqrt(2 / (n - 1))).all()
    # The mean log-prob of draws is minus the entropy, whose standard error is sqrt(1 / 2n) a dimension.
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert abs(found.log_prob.mean().item() + entropy) < 4 / math.sqrt(2 * n * 4)


@random_kernels
def test_the_density_integrates_to_one(kernel, s, s_next):
    x, v = torch.tensor([[0.3]], dtype=F64), torch.tensor([[-1.2]], dtype=F64)
    mean, std = kernel.moments(x, v, s, s_next)
    grid = mean + std * torch.linspace(-9, 9, 4001, dtype=F64)[:, None]
    density = replay(kernel, x.expand_as(grid), v.expand_as(grid), s, s_next, grid).log_prob.exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-12)


# ---- Marginals: data N(1, 0.5^2), whose velocity is known ---------------------------------------------

DATA_MEAN, DATA_STD = 1.0, 0.5


def velocity(x, s):
    """E[eps - x0 | x] for Gaussian data."""
    variance = (1 - s) ** 2 * DATA_STD**2 + s**2
    off = (x - (1 - s) * DATA_MEAN) / variance
    return s * off - (DATA_MEAN + (1 - s) * DATA_STD**2 * off)


def run(kernel, noise, num_steps):
    """Draws from data through many small steps, each with its own noise."""
    x = noise
    for i in range(num_steps):
        s, s_next = 1 - i / num_steps, 1 - (i + 1) / num_steps
        x = step(kernel, x, velocity(x, s), s, s_next, drawn(1000 + i, *x.shape)).next
    return x[:, 0]


def spread_after(coefficients, num_steps):
    """The exact mean and std of what `run` draws: all steps are linear, so no draw is needed."""
    times = 1 - torch.arange(num_steps + 1, dtype=F64) / num_steps
    s, s_next = times[:-1], times[1:]
    a, b, std = coefficients(s, s_next)
    shift = velocity(torch.zeros_like(s), s)
    factor = a + b * (velocity(torch.ones_like(s), s) - shift)
    mean, variance = 0.0, 1.0
    for f, by, noise in zip(factor.tolist(), (b * shift).tolist(), std.tolist(), strict=True):
        mean, variance = f * mean + by, f**2 * variance + noise**2
    return mean, math.sqrt(variance)


def no_correction(s, s_next):
    """Noise is added and the drift does not take it back."""
    return torch.ones_like(s), s_next - s, FlowSDE().coefficients(s, s_next)[2]


def kolmogorov_smirnov(one, other):
    """The largest gap between two empirical distribution functions."""
    places = torch.cat([one, other]).sort().values
    ranks = [torch.searchsorted(each.sort().values, places, right=True) / len(each) for each in (one, other)]
    return (ranks[0] - ranks[1]).abs().max().item()


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()], ids=repr)
def test_an_sde_keeps_the_marginals_of_the_ode(kernel):
    """Two samples of 10,000, 250 steps: means and stds within 4 standard errors, KS below its 0.001 level."""
    n, num_steps = 10_000, 250
    sde, ode = run(kernel, drawn(1, n, 1), num_steps), run(ODE(), drawn(2, n, 1), num_steps)
    assert abs(sde.mean() - ode.mean()) < 4 * DATA_STD * math.sqrt(2 / n)
    assert abs(sde.std() - ode.std()) < 4 * DATA_STD * math.sqrt(1 / n)
    level = math.sqrt(-math.log(0.001 / 2) / 2) * math.sqrt(2 / n)
    assert kolmogorov_smirnov(sde, ode) < level
    wrong = sde * (1 + 0.1)  # the test sees a tenth more spread
    assert kolmogorov_smirnov(wrong, ode) > level


def marginal_error(coefficients, num_steps):
    mean, std = spread_after(coefficients, num_steps)
    return math.hypot(mean - DATA_MEAN, std - DATA_STD)


@pytest.mark.parametrize("kernel", [DanceSDE(), ODE()], ids=repr)
def test_twice_the_steps_halve_the_error_of_the_marginals(kernel):
    errors = [marginal_error(kernel.coefficients, num_steps) for num_steps in (500, 1000, 2000)]
    assert errors[2] < 4e-4
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.01)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.01)


def test_flow_sde_reaches_the_marginals_at_the_rate_its_noise_forgets_the_first_steps():
    """g^2 is about eta^2 / (1 - s) near s = 1: what the first steps got wrong decays as num_steps^-(eta^2)."""
    errors = [marginal_error(FlowSDE(0.7).coefficients, num_steps) for num_steps in (8_000, 32_000, 128_000)]
    assert errors[0] < 5e-4
    assert errors[2] / errors[1] == pytest.approx(4 ** -(0.7**2), abs=0.03)


def test_without_the_score_in_the_drift_the_marginals_are_lost():
    _, std = spread_after(no_correction, 2000)
    assert std > 1.2 * DATA_STD
    assert marginal_error(FlowSDE().coefficients, 2000) < 1e-3, "and with it they are not"


def test_cps_keeps_coefficients_and_not_marginals():
    """Each step replaces noise by what x0^ believes, a mean: many steps narrow what is drawn."""
    for num_steps in (10, 2000):
        mean, std = spread_after(CPS(0.8).coefficients, num_steps)
        assert mean == pytest.approx(DATA_MEAN)
        assert std < 0.85 * DATA_STD
    assert marginal_error(CPS(0.0).coefficients, 2000) < 4e-4, "without noise it is the ODE"


# ---- Sampling is replay ------------------------------------------------------------------------------


@random_kernels
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_replay_of_what_was_stored_returns_the_sampled_log_prob(kernel, s, s_next, reduce, storage):
    x, v, noise = latents(5, 3, 4, 8, 8, dtype=torch.float32)
    x = x.to(storage)
    drawn_step = step(kernel, x, v.bfloat16(), s, s_next, noise, storage_dtype=storage, reduce=reduce)
    assert drawn_step.next.dtype == storage
    assert drawn_step.log_prob.dtype == drawn_step.mean.dtype == torch.float32
    again = replay(kernel, x, v.bfloat16(), s, s_next, drawn_step.next.clone(), reduce=reduce)
    assert torch.equal(again.log_prob, drawn_step.log_prob)
    assert torch.equal((again.log_prob - drawn_step.log_prob).exp(), torch.ones(3)), "the ratio is 1"
    assert torch.equal(log_ratio(again.mean, drawn_step.mean, again.std, again.next), torch.zeros(3))
    assert torch.equal(guard_log_ratio(again.mean, drawn_step.mean, again.std, again.next), torch.zeros(3))


@random_kernels
def test_scoring_before_storing_would_break_the_ratio(kernel, s, s_next):
    x, v, noise = latents(5, 3, 4, 8, 8, dtype=torch.float32)
    before = step(kernel, x, v, s, s_next, noise, reduce="sum")
    stored = before.next.bfloat16()
    assert (replay(kernel, x, v, s, s_next, stored, reduce="sum").log_prob - before.log_prob).abs().max() > 0.01


@random_kernels
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_one_time_for_all_rows_is_a_time_a_row(kernel, s, s_next, dtype):
    x, v, noise = latents(5, 3, 4, 2, 2, dtype=dtype)
    one = step(kernel, x, v, s, s_next, noise)
    rows = [torch.full((3,), t, dtype=dtype) for t in (s, s_next)]
    for times in ((rows[0], rows[1]), (s, rows[1]), (rows[0], torch.tensor(s_next, dtype=F64))):
        many = step(kernel, x, v, *times, noise)
        assert torch.equal(many.next, one.next)
        assert torch.equal(many.log_prob, one.log_prob)
        assert many.std.shape == (3, 1, 1, 1)


@pytest.mark.parametrize("kernel", FLOW_KERNELS, ids=repr)
def test_rows_at_their_own_times_do_not_see_each_other(kernel):
    x, v, noise = latents(5, 3, 4, 2, dtype=torch.float32)
    s, s_next = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.5, 0.1])
    together = step(kernel, x, v, s, s_next, noise)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = step(kernel, x[rows], v[rows], s[i].item(), s_next[i].item(), noise[rows])
        assert torch.equal(alone.next, together.next[rows])
        assert alone.log_prob is None or torch.equal(alone.log_prob, together.log_prob[rows])


@random_kernels
def test_float32_follows_float64(kernel, s, s_next):
    x, v, noise = latents(7, 2, 3, 4, 4)
    exact = step(kernel, x, v, s, s_next, noise)
    rough = step(kernel, x.float(), v.float(), s, s_next, noise.float())
    torch.testing.assert_close(rough.mean.double(), exact.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rough.log_prob.double(), exact.log_prob, rtol=1e-5, atol=1e-5)
    assert exact.log_prob.dtype == F64


def test_a_row_of_one_number_is_a_row():
    x, v, noise = latents(7, 5)
    found = step(CPS(), x, v, 0.8, 0.6, noise)
    assert found.log_prob.shape == (5,)
    torch.testing.assert_close(found.log_prob, gaussian(found.next[:, None], found.mean[:, None], found.std))


@random_kernels
def test_the_gradient_is_that_of_the_density_at_what_was_drawn(kernel, s, s_next):
    x, v, noise = latents(9, 2, 3)
    v.requires_grad_(True)
    found = step(kernel, x, v, s, s_next, noise, reduce="sum")
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), v)
    b = kernel.coefficients(*torch.tensor([[s], [s_next]], dtype=F64))[1].item()
    torch.testing.assert_close(gradient, noise * b / found.std)  # d/dv of -(x' - mean)^2 / (2 std^2), x' held still


# ---- No density ----------------------------------------------------------------------------------------


def test_a_deterministic_step_has_no_log_prob_and_needs_no_noise():
    x, v, _ = latents(3, 2, 3)
    for kernel, s, s_next in ((ODE(), 0.8, 0.6), (CPS(), 0.1, 0.0), (DDIM(), 0.9, 1.0), (FlowSDE(0.0), 1.0, 0.9)):
        found = step(kernel, x, v, s, s_next)
        assert found.log_prob is None
        assert torch.equal(found.next, found.mean)
        with pytest.raises(ContractError, match=r"std 0 and no density: leave that step out"):
            replay(kernel, x, v, s, s_next, found.next)
        for broken in (log_ratio, guard_log_ratio):
            with pytest.raises(ContractError, match="no density"):
                broken(found.mean, found.mean, found.std, found.next)
        with pytest.raises(ContractError, match="no density"):
            kl_means(found.mean, found.mean, found.std)


def test_the_steps_with_a_density_are_told_beforehand():
    times = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert steps_with_density(FlowSDE(), times) == (True, True, True, True)
    assert steps_with_density(CPS(), times) == (True, True, True, False)
    assert steps_with_density(ODE(), times) == (False,) * 4
    assert steps_with_density(DDIM(), (0.1, 0.5, 0.9, 1.0)) == (True, True, False)


def test_what_cannot_be_a_step_is_refused_in_one_line():
    x, v, noise = latents(3, 2, 3)
    rows = torch.tensor([0.8, 0.1])
    cases = {
        "s must fall, within \\[0, 1\\], got steps 0.6 to 0.8": lambda: step(FlowSDE(), x, v, 0.6, 0.8, noise),
        "got steps 1.2 to 0.8": lambda: step(CPS(), x, v, 1.2, 0.8, noise),
        "got steps 0.1 to 0.5": lambda: step(CPS(), x, v, rows, 0.5, noise),
        "got steps nan to 0.5": lambda: step(ODE(), x, v, math.nan, 0.5),
        "alpha_bar must not fall, within \\(0, 1\\], got steps 0.6 to 0.4": lambda: step(DDIM(), x, v, 0.6, 0.4, noise),
        "1 of 2 rows have a density": lambda: step(CPS(), x, v, 0.9, torch.tensor([0.5, 0.0]), noise),
        "latents are \\(2, 3\\) and the prediction is \\(2, 2\\)": lambda: step(CPS(), x, v[:, :2], 0.8, 0.6, noise),
        "latents are \\(2, 3\\) and x_next is \\(2, 2\\)": lambda: replay(CPS(), x, v, 0.8, 0.6, x[:, :2]),
        "noise of shape \\(2, 3\\), got none": lambda: step(CPS(), x, v, 0.8, 0.6),
        "a time is one number or \\(2,\\), one a row, got \\(3,\\)": lambda: step(
            CPS(), x, v, torch.ones(3), 0.6, noise
        ),
    }
    for message, attempt in cases.items():
        with pytest.raises(ContractError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match='must be "sum" or "mean"'):
        step(CPS(), x, v, 0.8, 0.6, noise, reduce="max")


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS(), DDIM()], ids=repr)
def test_a_negative_noise_level_is_refused(kernel):
    with pytest.raises(ValueError, match="eta"):
        evolve(kernel, eta=-0.1)
