import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reasonrl.kernels import group_advantages, guided_logits, log_softmax, selective_log_prob
from reasonrl.kernels.reference import k3, policy_terms

EPS = 1e-4
NEAR = (0.1 + 0.2, 0.3)  # equal but for rounding, on purpose
moderate = settings(max_examples=40, deadline=None)

labels = st.sampled_from([-3, 0, 7, 10**12])
values = st.sampled_from([*NEAR, 0.0, 0.25, 0.5, 1.0, 2.0, -1.0])
steps = st.lists(st.tuples(labels, st.none() | values), max_size=12)
seeds = st.integers(0, 2**31)

Step = list[tuple[int, float | None]]


def advantages(step: Step, *, scale: str = "std", unscored: float = 0.0) -> tuple[Tensor, Tensor]:
    """Asks for the advantages of (group, reward) rows; None = unscored."""
    rewards = [unscored if value is None else value for _, value in step]
    return group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor([label for label, _ in step], dtype=torch.int64),
        torch.tensor([value is not None for _, value in step], dtype=torch.bool),
        scale=scale,
        eps=EPS,
    )


def transcribed(step: Step, *, scale: str = "std") -> list[float]:
    """DeepSeekMath 4.1 in plain floats: (r - mean) / (std + eps), the standard deviation of ddof 1."""
    found = []
    for label, value in step:
        group = [v for other, v in step if other == label and v is not None]
        if value is None or max(group) - min(group) < 1e-9:
            found.append(0.0)
        else:
            found.append((value - fmean(group)) / (stdev(group) + EPS if scale == "std" else 1.0))
    return found


def clipped_surrogate(live, old, advantage, *, low, high):
    """Returns each action's surrogate, and where it was clipped."""
    rows = [value.reshape(1, -1) for value in (live, old, advantage)]
    terms = policy_terms(*rows, torch.ones_like(rows[0], dtype=torch.bool), clip=(low, high))
    return terms["surrogate"].reshape(live.shape), (terms["clip_low"] + terms["clip_high"]).reshape(live.shape).bool()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Advantages ------------------------------------------------------------------------------


@moderate
@given(steps, st.sampled_from(["std", "none"]))
def test_advantages_equal_the_formula_of_the_paper(step, scale):
    found, _ = advantages(step, scale=scale)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(transcribed(step, scale=scale), rel=1e-5, abs=1e-6)


@moderate
@given(steps)
def test_advantages_of_a_group_sum_to_zero(step):
    found, _ = advantages(step)
    for label in {label for label, _ in step}:
        mine = [a for a, (other, _) in zip(found.tolist(), step, strict=True) if other == label]
        assert sum(mine) == pytest.approx(0, abs=1e-5)


@moderate
@given(steps, st.sampled_from([-4.0, -0.5, 0.125, 3.0]))
def test_a_constant_added_to_every_reward_changes_nothing(step, shift):
    found, takes_part = advantages(step)
    shifted = [(label, None if value is None else value + shift) for label, value in step]
    moved, same = advantages(shifted)
    torch.testing.assert_close(moved, found, rtol=1e-5, atol=1e-6)
    assert torch.equal(same, takes_part)


@moderate
@given(steps, st.sampled_from([0.0, 100.0, math.nan, math.inf]))
def test_unscored_rows_are_zero_and_do_not_move_the_others(step, unscored):
    found, takes_part = advantages(step, unscored=unscored)
    scored = torch.tensor([value is not None for _, value in step], dtype=torch.bool)
    assert not found[~scored].any()
    assert not takes_part[~scored].any()
    alone, part = advantages([row for row in step if row[1] is not None])
    assert torch.equal(found[scored], alone)
    assert torch.equal(takes_part[scored], part)


@moderate
@given(steps)
def test_a_row_takes_part_where_its_group_has_two_scored_rows(step):
    number = [sum(o == label and v is not None for o, v in step) for label, _ in step]
    expected = [v is not None and n >= 2 for (_, v), n in zip(step, number, strict=True)]
    found, takes_part = advantages(step)
    assert takes_part.tolist() == expected
    assert not found[~takes_part].any()


@moderate
@given(st.lists(st.sampled_from(NEAR), min_size=1, max_size=8), st.sampled_from(["std", "none"]))
def test_rewards_equal_but_for_rounding_give_exactly_zero(rewards, scale):
    found, _ = advantages([(0, reward) for reward in rewards], scale=scale)
    assert found.tolist() == [0.0] * len(rewards)


@moderate
@given(steps.flatmap(lambda step: st.tuples(st.just(step), st.permutations(range(len(step))))))
def test_advantages_follow_their_rows_in_any_order(step_and_order):
    step, order = step_and_order
    found, takes_part = advantages(step)
    turned, part = advantages([step[i] for i in order])
    torch.testing.assert_close(turned, found[list(order)], rtol=1e-5, atol=1e-6)
    assert torch.equal(part, takes_part[list(order)])


@moderate
@given(steps)
def test_only_equality_of_group_labels_matters(step):
    names = {label: -5 * i for i, label in enumerate({label for label, _ in step})}
    found, takes_part = advantages([(names[label], value) for label, value in step])
    assert torch.equal(found, advantages(step)[0])
    assert torch.equal(takes_part, advantages(step)[1])


def test_golden_advantages_of_two_interleaved_groups():
    found, takes_part = advantages([(9, 0.0), (2, 1.0), (9, 1.0), (2, 3.0), (9, 2.0)])
    half = 1 / (math.sqrt(2) + EPS)
    expected = [-1 / (1 + EPS), -half, 0.0, half, 1 / (1 + EPS)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert takes_part.all()


def test_golden_advantages_without_scale_are_gaps_to_the_mean():
    found, _ = advantages([(0, 0.0), (0, 1.0), (0, 5.0)], scale="none")
    assert found.tolist() == [-2.0, -1.0, 3.0]


def test_a_group_of_one_takes_no_part():
    found, takes_part = advantages([(0, 1.0), (1, 0.0), (1, 1.0)])
    assert found[0] == 0
    assert takes_part.tolist() == [False, True, True]


def test_no_rows_have_no_advantages():
    found, takes_part = advantages([])
    assert (found.shape, takes_part.shape) == ((0,), (0,))
    assert (found.dtype, takes_part.dtype) == (torch.float32, torch.bool)


def test_the_tolerance_is_relative_for_large_rewards():
    found, _ = advantages([(0, 1e9), (0, 1e9 + 1)])
    assert found.tolist() == [0.0, 0.0]


# ---- Log-probs -------------------------------------------------------------------------------

guidance = pytest.mark.parametrize("cfg_weight", [0.0, 1.0, 3.0, 5.0])
heat = pytest.mark.parametrize("temperature", [0.7, 1.0])


def plain_log_probs(c: Tensor, u: Tensor, *, cfg_weight: float, temperature: float) -> Tensor:
    guided = (u.double() + cfg_weight * (c.double() - u.double())) / temperature
    return guided - guided.exp().sum(-1, keepdim=True).log()


@guidance
@heat
@settings(max_examples=10, deadline=None)
@given(seeds)
def test_log_probs_and_entropy_equal_float64(cfg_weight, temperature, seed):
    c, u = random(2, 2, 3, 7, seed=seed, dtype=torch.float32)
    target = torch.arange(6).reshape(2, 3)
    asked = {"cfg_weight": cfg_weight, "temperature": temperature}
    every = plain_log_probs(c, u, **asked)
    found = selective_log_prob(c, target, uncond_logits=u, return_entropy=True, **asked)
    assert found.log_prob.dtype == found.entropy.dtype == torch.float32
    chosen = every.gather(-1, target[..., None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    torch.testing.assert_close(found.log_prob.double(), chosen, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=1e-4)
    whole = log_softmax(c, uncond_logits=u, **asked).double()
    torch.testing.assert_close(whole, every, rtol=0, atol=1e-4)


@guidance
def test_guidance_mixes_the_two_branches(cfg_weight):
    c, u = random(2, 4, 5)
    torch.testing.assert_close(guided_logits(c, u, cfg_weight), (1 - cfg_weight) * u + cfg_weight * c)


def test_guidance_without_a_second_branch_is_the_first():
    logits = random(4, 5, dtype=torch.bfloat16)
    assert torch.equal(guided_logits(logits, None, 5.0), logits.float())
    assert torch.equal(guided_logits(logits, random(4, 5), 1.0), logits.float())


@heat
def test_gradient_of_a_log_prob_is_one_hot_less_softmax(temperature):
    logits = random(3, 5).requires_grad_()
    target = torch.tensor([0, 2, 4])
    selective_log_prob(logits, target, temperature=temperature).log_prob.sum().backward()
    probs = (logits.detach() / temperature).softmax(-1)
    expected = (torch.nn.functional.one_hot(target, 5) - probs) / temperature
    torch.testing.assert_close(logits.grad, expected)


def test_entropy_is_absent_unless_asked_for():
    logits, target = random(3, 5), torch.zeros(3, dtype=torch.int64)
    assert selective_log_prob(logits, target).entropy is None


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 5))
def test_a_masked_vocabulary_has_the_entropy_of_what_is_left(seed, num_masked):
    logits = random(4, 6, seed=seed, dtype=torch.float32)
    logits[:, 6 - num_masked :] = -math.inf
    target = torch.zeros(4, dtype=torch.int64)
    found = selective_log_prob(logits, target, return_entropy=True)
    left = selective_log_prob(logits[:, : 6 - num_masked], target, return_entropy=True)
    torch.testing.assert_close(found.entropy, left.entropy)
    torch.testing.assert_close(found.log_prob, left.log_prob)


@guidance
def test_a_token_masked_in_both_branches_stays_masked_under_guidance(cfg_weight):
    c, u = random(2, 4, 6)
    c[:, 3:], u[:, 3:] = -math.inf, -math.inf
    target = torch.zeros(4, dtype=torch.int64)
    asked = {"cfg_weight": cfg_weight, "return_entropy": True}
    found = selective_log_prob(c, target, uncond_logits=u, **asked)
    left = selective_log_prob(c[:, :3], target, uncond_logits=u[:, :3], **asked)
    torch.testing.assert_close(found.entropy, left.entropy)
    torch.testing.assert_close(found.log_prob, left.log_prob)


def test_golden_log_prob_and_entropy_of_a_fair_coin():
    found = selective_log_prob(torch.zeros(1, 2), torch.tensor([1]), return_entropy=True)
    assert found.log_prob.item() == pytest.approx(-math.log(2))
    assert found.entropy.item() == pytest.approx(math.log(2))


# ---- KL --------------------------------------------------------------------------------------

log_ps = st.floats(-20, 0)


@moderate
@given(st.lists(st.tuples(log_ps, log_ps), min_size=1))
def test_k3_is_never_negative_and_zero_where_equal(pairs):
    live, reference = torch.tensor(pairs, dtype=torch.float64).T
    found = k3(live, reference)
    assert (found >= 0).all()
    assert not k3(live, live).any()


@moderate
@given(seeds)
def test_k3_under_the_live_distribution_is_the_exact_kl(seed):
    live, reference = random(2, 5, seed=seed).log_softmax(-1)
    exact = (live.exp() * (live - reference)).sum()
    torch.testing.assert_close((live.exp() * k3(live, reference)).sum(), exact)


def test_golden_k3_of_a_token_twice_as_likely_in_the_reference():
    found = k3(torch.tensor(math.log(0.25)), torch.tensor(math.log(0.5)))
    assert found.item() == pytest.approx(2 - math.log(2) - 1)


# ---- Clipped surrogate -----------------------------------------------------------------------

actions = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.integers(-16, 16).map(lambda n: n / 8))
clips = st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([0.2, 0.28]))


def transcribed_surrogate(live, old, advantage, *, low, high):
    """Equation 7 of arXiv 1707.06347 in plain floats, as a loss."""
    ratio = math.exp(live - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, clipped * advantage)


@moderate
@given(st.lists(actions, min_size=1, max_size=8), clips)
def test_surrogate_equals_equation_7_of_ppo(rows, clip):
    low, high = clip
    live, old, advantage = torch.tensor(rows, dtype=torch.float64).T
    found, _ = clipped_surrogate(live, old, advantage, low=low, high=high)
    expected = [transcribed_surrogate(*row, low=low, high=high) for row in rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@moderate
@given(st.lists(actions.filter(lambda row: row[2] != 0), min_size=1, max_size=8), clips)
def test_gradient_is_zero_exactly_where_clipped(rows, clip):
    low, high = clip
    live, old, advantage = torch.tensor(rows, dtype=torch.float64).T
    live = live.clone().requires_grad_()
    found, clipped = clipped_surrogate(live, old, advantage, low=low, high=high)
    found.sum().backward()
    ratio = (live.detach() - old).exp()
    outside = ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))
    assert torch.equal(clipped, outside)
    expected = torch.where(outside, 0.0, -ratio * advantage)
    torch.testing.assert_close(live.grad, expected, rtol=1e-12, atol=0)
    assert torch.equal(live.grad == 0, outside)


def test_golden_surrogate_at_four_corners():
    live = torch.tensor([2.0, 0.5, 2.0, 0.5]).log()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found, clipped = clipped_surrogate(live, torch.zeros(4), advantage, low=0.2, high=0.3)
    assert found.tolist() == pytest.approx([-1.3, -0.5, 2.0, 0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_an_advantage_of_zero_neither_clips_nor_moves():
    live = torch.tensor([2.0, 1.0, 0.1]).log().requires_grad_()
    found, clipped = clipped_surrogate(live, torch.zeros(3), torch.zeros(3), low=0.2, high=0.2)
    found.sum().backward()
    assert not clipped.any()
    assert not live.grad.any()
