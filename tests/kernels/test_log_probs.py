"""Every backend against `reference`, in float64 on the same inputs; then properties, then bugs of peers."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.backends import DEVICE, each_backend, poisoned, quiet, running
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.kernels import linear_log_prob, linear_logits, reference, selective_log_prob
from reasonrl.kernels.matmul import exact_products

pytestmark = quiet
# Never only multiples of a block: 31, 1023, 1025, 257.
vocabularies = st.sampled_from([1, 2, 31, 64, 257])
seeds = st.integers(0, 2**31)
weights = st.sampled_from([0.0, 0.5, 1.0, 3.0, 5.0])
few = settings(max_examples=20, deadline=None)


def random(
    *shape: int, seed: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * scale + shift).to(dtype).to(DEVICE)


def words(vocab: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(found: reference.LogProbs, inputs: list[Tensor], *, entropy: bool = True) -> list[Tensor]:
    """Gradients of a weighted sum of everything differentiable."""
    slopes = torch.linspace(-1, 2, found.log_prob.numel(), dtype=torch.float64, device=DEVICE)
    total = (found.log_prob.flatten() * slopes).sum()
    if entropy:
        assert found.entropy is not None
        total = total + (found.entropy.flatten() * slopes.flip(0)).sum()
    return list(torch.autograd.grad(total, inputs))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max()) if found.numel() else 0.0


def relative(found: Tensor, wanted: Tensor) -> float:
    """Of the norm; a gradient far below the slopes' size of 1 is a difference of large parts."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1.0))


# ---- against float64 ----


@each_backend
@few
@given(seeds, vocabularies, weights, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_log_probs_of_logits_equal_float64(backend, seed, vocab, cfg_weight, dtype):
    logits = [random(2, 3, vocab, seed=seed + i, scale=6, shift=-20, dtype=dtype).requires_grad_() for i in (0, 1)]
    wide = [z.detach().double().requires_grad_() for z in logits]
    target, heat = words(vocab, 2, 3, seed=seed), random(2, 3, seed=seed).abs() + 0.5
    settings = {"cfg_weight": cfg_weight, "return_entropy": True}
    with running(backend):
        found = selective_log_prob(logits[0], target, uncond_logits=logits[1], temperature=heat, **settings)
    wanted = reference.selective_log_prob(wide[0], target, uncond_logits=wide[1], temperature=heat.double(), **settings)
    assert found.log_prob.dtype == found.entropy.dtype == torch.float32
    # The guided logits reach |z| = 200 here; the error is theirs, in units of float32.
    size = float(reference.guided_logits(*wide, cfg_weight).detach().abs().max()) / 50 / float(heat.min())
    assert error(found.log_prob, wanted.log_prob) <= 2e-5 * max(1, size)
    assert error(found.entropy, wanted.entropy) <= 1e-5 * max(1, size)
    assert error(found.log_sum_exp, wanted.log_sum_exp) <= 2e-5 * max(1, size)
    if cfg_weight != 1.0 and vocab > 1:
        for mine, theirs in zip(gradients(found, logits), gradients(wanted, wide), strict=True):
            assert mine.dtype == dtype
            bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]  # the interpreter truncates
            assert relative(mine, theirs) <= bound * max(1, size)


@each_backend
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # cuBLAS says so of itself
@pytest.mark.parametrize("num", [0, 4])
def test_no_row_to_answer_for_leaves_the_weights_gradient_zero(backend, num):
    hidden, weight, bias = random(num, 8, seed=0), random(50, 8, seed=1), random(50, seed=2)
    inputs = [v.requires_grad_() for v in (hidden, weight, bias)]
    with running(backend), poisoned():
        found = linear_log_prob(hidden, weight, words(50, num, seed=3).fill_(-100), bias=bias)
        slopes = torch.autograd.grad(found.log_prob.sum(), inputs)
    assert not any(slope.any() for slope in slopes)


@each_backend
@few
@example(457545921, 31, 1, True, True)
@given(seeds, st.sampled_from([2, 31, 257, 700]), st.sampled_from([1, 17, 64]), st.booleans(), st.booleans())
def test_log_probs_of_a_head_equal_float64(backend, seed, vocab, width, exact, lora):
    dtype = torch.bfloat16 if exact else torch.float32
    hidden, uncond = (random(7, width, seed=seed + i, dtype=dtype) for i in (0, 1))
    weight, bias = random(vocab, width, seed=seed + 2, dtype=dtype), random(vocab, seed=seed + 3, shift=-5, dtype=dtype)
    pair = (random(7, 3, seed=seed + 4, dtype=dtype), random(vocab, 3, seed=seed + 5, dtype=dtype)) if lora else None
    inputs = [hidden, uncond, weight, bias, *(pair or ())]
    narrow = [v.clone().requires_grad_() for v in inputs]
    wide = [v.double().requires_grad_() for v in inputs]
    target = words(vocab, 7, seed=seed)
    mask = words(2, 7, seed=seed + 6).bool()
    target[0] = -100

    def ask(function, v, **more):
        low = (v[4], v[5]) if lora else None
        return function(
            v[0], v[2], target, bias=v[3], uncond_hidden=v[1], cfg_weight=3.0, low_rank=low, temperature=1.5,
            mask=mask, return_entropy=True, **more,
        )  # fmt: skip

    with running(backend):
        found = ask(linear_log_prob, narrow, precision="exact", workspace_bytes=2**16)
        mine = gradients(found, narrow)
    wanted = ask(reference.linear_log_prob, wide)
    size = max(1.0, float((hidden.double() @ weight.double().T).abs().max()) / 10)
    assert error(found.log_prob, wanted.log_prob) <= 5e-5 * size
    assert error(found.entropy, wanted.entropy) <= 5e-5 * size
    left_out = ~mask | (target == -100)
    assert not found.log_prob[left_out].any()
    assert not found.entropy[left_out].any()
    theirs = gradients(wanted, wide)
    # Of width 1, a gradient may be one number, a sum over the vocabulary that cancels: its error is that of the terms.
    terms = float(theirs[3].abs().sum() * weight.abs().max()) if width == 1 else 0.0
    for here, there in zip(mine, theirs, strict=True):
        assert here.dtype == dtype
        # One element: dz and the result are each rounded once; Triton's interpreter truncates instead of rounding.
        rounding = 2**-8 + (2**-7 if backend == "triton" else 2**-8)
        bound = rounding if exact else 1e-5 * size
        assert relative(here, there) <= bound or error(here, there) <= bound * terms
    assert not mine[0][left_out].any()


@pytest.mark.parametrize("cfg_weight", [0.0, 1.0, 5.0])
def test_the_default_precision_rounds_a_mixed_hidden_and_says_how_much(cfg_weight):
    hidden, uncond = (random(64, 128, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    weight, target = random(512, 128, seed=2, scale=0.1, dtype=torch.bfloat16), words(512, 64, seed=3)
    settings = {"uncond_hidden": uncond, "cfg_weight": cfg_weight}
    wanted = reference.linear_log_prob(
        hidden.double(), weight.double(), target, uncond_hidden=uncond.double(), cfg_weight=cfg_weight
    ).log_prob
    exact = linear_log_prob(hidden, weight, target, precision="exact", **settings).log_prob
    default = linear_log_prob(hidden, weight, target, **settings).log_prob
    fast = linear_log_prob(hidden, weight, target, precision="fast", **settings).log_prob
    assert error(exact, wanted) <= 5e-5
    assert error(default, wanted) <= (0.1 if cfg_weight == 5 else 1e-5)
    assert error(default, wanted) < error(fast, wanted) < 0.5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)])
def test_errors_of_log_probs_and_gradients_at_a_usual_size(dtype, bound):
    hidden, weight = random(256, 256, seed=0, dtype=dtype), random(3001, 256, seed=1, scale=0.15, dtype=dtype)
    bias, target = random(3001, seed=2, dtype=dtype), words(3001, 256, seed=3)
    narrow = [v.clone().requires_grad_() for v in (hidden, weight, bias)]
    wide = [v.double().requires_grad_() for v in (hidden, weight, bias)]
    found = linear_log_prob(narrow[0], narrow[1], target, bias=narrow[2], return_entropy=True, workspace_bytes=2**21)
    wanted = reference.linear_log_prob(wide[0], wide[1], target, bias=wide[2], return_entropy=True)
    assert error(found.log_prob, wanted.log_prob) <= 5e-5
    assert error(found.entropy, wanted.entropy) <= 5e-5
    for mine, theirs in zip(gradients(found, narrow), gradients(wanted, wide), strict=True):
        assert float((mine.double() - theirs).norm() / theirs.norm()) <= bound


def test_the_torch_path_passes_gradcheck_in_float64():
    def ask(hidden, uncond, weight, bias, low, high):
        found = linear_log_prob(
            hidden, weight, target, bias=bias, uncond_hidden=uncond, cfg_weight=2.5, low_rank=(low, high),
            temperature=0.7, return_entropy=True, workspace_bytes=1024,
        )  # fmt: skip
        return found.log_prob, found.entropy

    target = words(300, 4, seed=0)
    shapes = [(4, 5), (4, 5), (300, 5), (300,), (4, 2), (300, 2)]
    inputs = [random(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(ask, inputs)
    logits = [random(4, 9, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1)]

    def from_logits(cond, uncond):
        found = selective_log_prob(cond, words(9, 4, seed=1), uncond_logits=uncond, cfg_weight=3, return_entropy=True)
        return found.log_prob, found.entropy

    assert torch.autograd.gradcheck(from_logits, logits)


# ---- properties ----


@each_backend
@few
@given(seeds, vocabularies, st.sampled_from([-500.0, -150.0, 1e4]))
def test_a_shift_of_all_logits_changes_nothing(backend, seed, vocab, shift):
    logits = random(4, vocab, seed=seed, scale=4).round(decimals=0)  # so that the shifted ones are exact
    target = words(vocab, 4, seed=seed)
    with running(backend):
        plain = selective_log_prob(logits, target, return_entropy=True)
        moved = selective_log_prob(logits + shift, target, return_entropy=True)
    assert error(plain.log_prob, moved.log_prob) <= 2e-6
    assert error(plain.entropy, moved.entropy) <= 2e-6


@each_backend
@few
@given(seeds, st.sampled_from([0.3, 1.0, 4.0]))
def test_temperature_is_a_division_of_the_logits(backend, seed, heat):
    logits, target = random(4, 33, seed=seed, scale=3), words(33, 4, seed=seed)
    with running(backend):
        found = selective_log_prob(logits, target, temperature=heat).log_prob
        divided = selective_log_prob(logits / heat, target).log_prob
    assert error(found, divided) <= 1e-5 / heat


@each_backend
@few
@given(seeds, st.sampled_from([1, 2, 5, 40]))
def test_the_probabilities_of_all_words_sum_to_one(backend, seed, vocab):
    logits = random(1, vocab, seed=seed, scale=5).expand(vocab, vocab)
    with running(backend):
        found = selective_log_prob(logits, torch.arange(vocab, device=DEVICE), return_entropy=True)
    assert found.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert -1e-6 <= found.entropy[0].item() <= math.log(vocab) + 1e-6


@few
@given(seeds, st.integers(1, 2**22))
def test_no_workspace_changes_the_result(seed, workspace):
    hidden, weight = random(9, 8, seed=seed).requires_grad_(), random(1025, 8, seed=seed + 1).requires_grad_()
    target = words(1025, 9, seed=seed)
    found = [
        linear_log_prob(hidden, weight, target, return_entropy=True, workspace_bytes=w) for w in (workspace, 2**28)
    ]
    assert error(found[0].log_prob, found[1].log_prob) <= 5e-6
    slopes = [gradients(f, [hidden, weight]) for f in found]
    assert all(relative(a, b.double()) <= 1e-6 for a, b in zip(*slopes, strict=True))


@few
@given(seeds, weights)
def test_guidance_of_a_head_is_guidance_of_its_logits(seed, cfg_weight):
    cond, uncond = random(5, 6, seed=seed), random(5, 6, seed=seed + 1)
    weight, bias = random(20, 6, seed=seed + 2), random(20, seed=seed + 3)
    logits = linear_logits(cond, weight, bias=bias, uncond_hidden=uncond, cfg_weight=cfg_weight)
    heads = [state @ weight.T + bias for state in (cond, uncond)]
    assert error(logits, reference.guided_logits(heads[0], heads[1], cfg_weight)) <= 5e-5
    target = words(20, 5, seed=seed)
    found = linear_log_prob(cond, weight, target, bias=bias, uncond_hidden=uncond, cfg_weight=cfg_weight)
    drawn_from = reference.log_softmax(logits).gather(1, target[:, None]).squeeze(1)
    assert error(found.log_prob, drawn_from) <= 1e-5


@each_backend
@few
@given(seeds)
def test_gradients_of_a_row_sum_to_zero_over_the_vocabulary(backend, seed):
    logits = random(3, 100, seed=seed, scale=3).requires_grad_()
    with running(backend):
        found = selective_log_prob(logits, words(100, 3, seed=seed), return_entropy=True)
        [slope] = gradients(found, [logits])
    assert slope.sum(1).abs().max().item() <= 1e-5


def test_a_frozen_head_has_the_same_gradient_of_hidden_and_none_of_its_own():
    hidden, weight = random(6, 8, seed=0).requires_grad_(), random(40, 8, seed=1)
    target = words(40, 6, seed=2)
    [frozen] = torch.autograd.grad(linear_log_prob(hidden, weight, target).log_prob.sum(), [hidden])
    live = weight.clone().requires_grad_()
    both = torch.autograd.grad(linear_log_prob(hidden, live, target).log_prob.sum(), [hidden, live])
    assert torch.equal(frozen, both[0])


def test_a_low_rank_pair_is_the_merged_weight():
    hidden, weight = random(6, 8, seed=0), random(40, 8, seed=1)
    down, up = random(2, 8, seed=2), random(40, 2, seed=3)
    target = words(40, 6, seed=4)
    pair = linear_log_prob(hidden, weight, target, low_rank=(hidden @ down.T, up)).log_prob
    assert error(pair, linear_log_prob(hidden, weight + up @ down, target).log_prob) <= 1e-5


# ---- bugs of peers ----


@each_backend
@pytest.mark.parametrize("vocab", [1023, 1025])
def test_no_ghost_columns_beyond_a_vocabulary_that_fits_no_block(backend, vocab):
    logits, target = random(2, vocab, seed=0, shift=-20), words(vocab, 2, seed=1)
    with running(backend):
        found = selective_log_prob(logits, target)
    assert error(found.log_prob, reference.selective_log_prob(logits.double(), target).log_prob) <= 2e-5


@each_backend
def test_logits_below_the_smallest_exponential_have_log_probs(backend):
    hidden, weight = torch.ones(2, 1, device=DEVICE), torch.full((600, 1), -150.0, device=DEVICE)
    with running(backend):
        found = linear_log_prob(hidden, weight, words(600, 2, seed=0), return_entropy=True, workspace_bytes=1)
    assert error(found.log_prob, torch.full((2,), -math.log(600))) <= 1e-5
    assert error(found.entropy, torch.full((2,), math.log(600))) <= 1e-5


@each_backend
def test_entropy_survives_a_large_offset(backend):
    logits = random(3, 200, seed=0).round(decimals=2)
    with running(backend):
        found = selective_log_prob((logits + 1e4), words(200, 3, seed=1), return_entropy=True)
    wanted = reference.selective_log_prob((logits + 1e4).double(), words(200, 3, seed=1), return_entropy=True)
    assert error(found.entropy, wanted.entropy) <= 1e-5


@each_backend
def test_a_target_that_is_almost_certain_still_has_a_gradient(backend):
    logits = torch.zeros(1, 50, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 7] = 12.0
    logits.requires_grad_()
    with running(backend):
        [slope] = torch.autograd.grad(
            selective_log_prob(logits, torch.tensor([7], device=DEVICE)).log_prob.sum(), [logits]
        )
    assert slope[0, 7].item() == pytest.approx(49 / (math.exp(12) + 49), rel=1e-2)


@each_backend
@pytest.mark.parametrize("guided", [False, True])
def test_masked_words_blocks_and_rows(backend, guided):
    vocab = 5000  # a first block of the Triton kernel that is all −inf
    logits = random(4, vocab, seed=0, scale=2)
    logits[0, 10] = -torch.inf
    logits[1, :4500] = -torch.inf
    logits[2] = -torch.inf
    other = random(4, vocab, seed=1, scale=2)
    other[3, 4:] = -torch.inf
    target = torch.tensor([10, 4600, 3, 2], device=DEVICE)
    settings = {"uncond_logits": other if guided else None, "cfg_weight": 3.0, "return_entropy": True}
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with running(backend):
        found = selective_log_prob(leaf, target, **settings)
        [slope] = torch.autograd.grad(found.log_prob[[1, 3]].sum() + found.entropy.sum(), [leaf])
    wanted = reference.selective_log_prob(wide, target, **settings)
    [theirs] = torch.autograd.grad(wanted.log_prob[[1, 3]].sum() + wanted.entropy.sum(), [wide])
    assert found.log_prob[[0, 2]].tolist() == [-torch.inf, -torch.inf]
    assert error(found.log_prob[[1, 3]], wanted.log_prob[[1, 3]]) <= 2e-5
    assert error(found.entropy, wanted.entropy) <= 1e-5
    assert not slope[2].any()
    assert error(slope, theirs) <= 1e-5


@each_backend
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_positions_have_no_log_probs(backend, shape):
    hidden, weight = torch.zeros(*shape, 4, device=DEVICE).requires_grad_(), torch.zeros(9, 4, device=DEVICE)
    target = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    with running(backend):
        found = linear_log_prob(hidden, weight, target, return_entropy=True)
        found.log_prob.sum().backward()
        assert selective_log_prob(hidden, target).log_prob.shape == shape
    assert found.log_prob.shape == found.entropy.shape == shape
    assert hidden.grad.shape == hidden.shape


@each_backend
def test_views_strides_and_misaligned_targets(backend):
    logits = random(3, 8, 21, seed=0)
    target = words(21, 3 * 8 + 1, seed=1)[1:].view(3, 8)
    everything = reference.selective_log_prob(logits, target).log_prob
    with running(backend):
        assert error(selective_log_prob(logits[:, :-1], target[:, :-1].int()).log_prob, everything[:, :-1]) <= 2e-5
        turned = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not turned.is_contiguous()
        assert error(selective_log_prob(turned, target).log_prob, everything) <= 2e-5
        assert (
            error(selective_log_prob(logits[0, :1].expand(5, 21), target[0, :5]).log_prob[0], everything[0, 0]) <= 2e-5
        )


@each_backend
def test_a_target_outside_the_vocabulary_is_nan_and_ignored_ones_are_zero(backend):
    logits = random(4, 6, seed=0)
    target = torch.tensor([6, -1, -100, 2], device=DEVICE)
    with running(backend):
        found = selective_log_prob(logits, target).log_prob
    assert found[:2].isnan().all()
    assert found[2] == 0
    assert found[3].isfinite()


def test_a_gradient_of_a_gradient_is_refused():
    logits = random(2, 5, seed=0).requires_grad_()
    [slope] = torch.autograd.grad(
        selective_log_prob(logits, words(5, 2, seed=1)).log_prob.sum(), [logits], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"does not require grad|autograd"):
        slope.sum().backward()


# ---- what is refused ----

HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.zeros(2, 3, 5)}, r"weight must be \(V, H\) .* got weight \(9, 4\) and hidden \(2, 3, 5\)"),
        ({"target": torch.zeros(2, 4, dtype=torch.int64)}, r"target must be \(2, 3\), .* got int64 of \(2, 4\)"),
        ({"target": torch.zeros(2, 3)}, r"target must be int32 or int64 word ids, got float32 of \(2, 3\)"),
        ({"hidden": torch.zeros(2, 3, 4).int()}, "hidden must be bfloat16, .* got int32"),
        ({"bias": torch.zeros(8)}, r"bias must be \(9,\) to fit weight, got float32 of \(8,\)"),
        ({"uncond_hidden": torch.zeros(2, 4)}, r"uncond_hidden must be \(2, 3, 4\) to fit hidden"),
        ({"low_rank": (torch.zeros(2, 3, 2), torch.zeros(9, 3))}, r"low_rank u must be \(2, 3, 3\)"),
        ({"low_rank": (torch.zeros(2, 3, 2), torch.zeros(8, 2))}, r"low_rank B must be \(9, 2\)"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": torch.zeros(2, 3)}, "temperature must be above 0 everywhere, got 0.0"),
        ({"temperature": torch.ones(2)}, r"float of \(2, 3\), got float32 of \(2,\)"),
        ({"mask": torch.ones(2, 3)}, r"mask must be bool of \(2, 3\), the positions of hidden, got float32"),
        ({"precision": "double"}, "precision must be 'default', 'exact' or 'fast', got 'double'"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight is on meta and hidden on cpu: move them to one device"),
        ({"weight": [1.0]}, "weight must be a tensor, got list"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, said):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    with pytest.raises(ContractError, match=said) as caught:
        linear_log_prob(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)
    assert "\n" not in str(caught.value)


# ---- found by review ----


@each_backend
@quiet
@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_the_entropy_of_masked_words_has_a_gradient_at_any_scale(backend, least):
    logits = torch.tensor([[1.0, 2.0, least, 0.0]], device=DEVICE)
    wide = logits.double().requires_grad_()
    logits.requires_grad_()
    target = torch.tensor([0], device=DEVICE)
    with running(backend):
        found = selective_log_prob(logits, target, temperature=0.5, return_entropy=True)
        (slope,) = torch.autograd.grad(3 * found.entropy.sum() + found.log_prob.sum(), logits)
    alive = [0, 1, 3]
    kept = reference.selective_log_prob(wide[:, alive], target, temperature=0.5, return_entropy=True)
    (wanted,) = torch.autograd.grad(3 * kept.entropy.sum() + kept.log_prob.sum(), wide)
    assert error(found.entropy, kept.entropy) <= 1e-5
    assert error(slope, wanted) <= 1e-5
    spec = reference.selective_log_prob(wide, target, temperature=0.5, return_entropy=True)
    (specified,) = torch.autograd.grad(3 * spec.entropy.sum() + spec.log_prob.sum(), wide)
    assert error(specified, wanted) <= 1e-12


@each_backend
@quiet
def test_a_first_block_that_is_masked_by_the_smallest_number_leaves_the_entropy(backend):
    hidden, weight = random(3, 8, seed=0), random(700, 8, seed=1)
    bias = torch.zeros(700, device=DEVICE)
    bias[:512] = torch.finfo(torch.float32).min
    target = words(100, 3, seed=2) + 550
    with running(backend):
        found = linear_log_prob(
            hidden, weight, target, bias=bias, temperature=0.7, return_entropy=True, workspace_bytes=1
        )
    wanted = reference.linear_log_prob(
        hidden.double(), weight[512:].double(), target - 512, temperature=0.7, return_entropy=True
    )
    assert error(found.log_prob, wanted.log_prob) <= 1e-5
    assert error(found.entropy, wanted.entropy) <= 1e-5


@each_backend
def test_a_bias_with_gaps_in_memory_is_read_as_it_is(backend):
    hidden, weight, gaps = random(3, 8, seed=0), random(50, 8, seed=1), random(100, seed=2)
    target = words(50, 3, seed=3)
    for bias in (gaps[::2], gaps[:1].expand(50)):
        with running(backend):
            found = linear_log_prob(hidden, weight, target, bias=bias)
        assert error(found.log_prob, linear_log_prob(hidden, weight, target, bias=bias.clone()).log_prob) <= 1e-6


@each_backend
@quiet
@pytest.mark.parametrize("how", ["mask", "ignore_index"])
def test_nan_in_a_row_that_is_left_out_reaches_no_gradient(backend, how):
    hidden, weight = random(4, 8, seed=0), random(50, 8, seed=1).requires_grad_()
    hidden[1] = torch.nan
    hidden.requires_grad_()
    target = words(50, 4, seed=2)
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    if how == "mask":
        mask[1] = False
    else:
        target[1] = -100
    with running(backend):
        found = linear_log_prob(hidden, weight, target, mask=mask if how == "mask" else None, return_entropy=True)
        slopes = torch.autograd.grad((found.log_prob + found.entropy).sum(), (hidden, weight))
        logits = (hidden.detach() @ weight.detach().T).requires_grad_()
        plain = selective_log_prob(logits, target, mask=mask, return_entropy=True)
        slopes += torch.autograd.grad((plain.log_prob + plain.entropy).sum(), logits)
    assert not any(slope.isnan().any() for slope in slopes)
    assert not slopes[0][1].any()
    assert not slopes[2][1].any()


def test_float16_gradients_that_sum_beyond_float16_before_scaling_are_finite():
    num = 4000
    hidden, weight = random(num, 4, seed=0, dtype=torch.float16), random(30, 4, seed=1, dtype=torch.float16) / 8
    hidden[:, 0] = 60
    weight.requires_grad_()
    target = torch.zeros(num, dtype=torch.int64, device=DEVICE)
    (slope,) = torch.autograd.grad(linear_log_prob(hidden, weight, target).log_prob.mean(), weight)
    wide = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.linear_log_prob(hidden.double(), wide, target).log_prob.mean(), wide)
    assert relative(slope, wanted) <= 2e-3


@each_backend
def test_unconditional_logits_keep_their_own_precision(backend):
    logits, uncond = random(3, 40, seed=0, scale=5, dtype=torch.bfloat16), random(3, 40, seed=1, scale=5)
    uncond.requires_grad_()
    target = words(40, 3, seed=2)
    with running(backend):
        found = selective_log_prob(logits, target, uncond_logits=uncond, cfg_weight=5.0)
        (slope,) = torch.autograd.grad(found.log_prob.sum(), uncond)
    wide = uncond.detach().double().requires_grad_()
    wanted = reference.selective_log_prob(logits.double(), target, uncond_logits=wide, cfg_weight=5.0)
    assert error(found.log_prob, wanted.log_prob) <= 5e-5
    assert error(slope, torch.autograd.grad(wanted.log_prob.sum(), wide)[0]) <= 2e-5


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_exact_takes_the_finer_of_two_dtypes(dtypes):
    hidden, weight = random(5, 16, seed=0, dtype=dtypes[0]), random(60, 16, seed=1, dtype=dtypes[1])
    target = words(60, 5, seed=2)
    with mock.patch("reasonrl.kernels.head.exact_products", wraps=exact_products) as asked:
        found = linear_log_prob(hidden, weight, target, precision="exact").log_prob
    assert all(call.args[0].dtype != torch.bfloat16 for call in asked.call_args_list)
    wanted = reference.linear_log_prob(hidden.double(), weight.double(), target).log_prob
    assert error(found, wanted) <= (1e-12 if dtypes[0] == torch.float64 else 1e-5)


def test_the_process_keeps_its_switches():
    matmul = torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision
    hidden, weight = random(2, 8, seed=0, dtype=torch.bfloat16), random(9, 8, seed=1, dtype=torch.bfloat16)
    try:
        torch.backends.fp32_precision = "tf32"
        linear_log_prob(hidden, weight, words(9, 2, seed=2))
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
    with pytest.raises(ZeroDivisionError), exact_products(hidden):
        1 / 0  # noqa: B018
    assert matmul.fp32_precision != "bf16"
