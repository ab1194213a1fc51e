"""What only a CUDA machine can show of `reasonrl.kernels`: cuBLAS and compiled Triton, at the shapes of training."""

import pytest
import torch
from tests.gpu.problems import (
    ALL,
    DEVICE,
    NUM_ROWS,
    a_whole_problem,
    ask_head,
    branches,
    error,
    everything,
    extra_memory,
    gradients,
    head,
    in_float64,
    leaves,
    policy_batch,
    random,
    relative,
    rounded,
    words,
)
from tests.kernels.backends import poisoned

from reasonrl.kernels import group_advantages, linear_log_prob, policy_loss, reference, selective_log_prob
from reasonrl.kernels.backend import uses_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest tests/gpu` on one"),
]
GRADIENT_BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# Tensor cores keep fewer bits than float32 while they add up a product; most of the error is theirs (seen on an H100).
HEAD_BOUNDS = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-4}
each_dtype = pytest.mark.parametrize("dtype", GRADIENT_BOUNDS, ids=str)


def test_the_default_here_is_compiled_triton():
    from triton import JITFunction

    from reasonrl.kernels.triton_log_prob import _fold

    assert uses_triton("auto", torch.empty(1, device=DEVICE))
    assert isinstance(_fold, JITFunction)


# ---- against float64 ----


@each_dtype
@pytest.mark.parametrize("vocab", [16384, 16385, 50257, 102400])
@pytest.mark.parametrize("cfg_weight", [1.0, 5.0])
def test_log_probs_of_logits_equal_float64(dtype, vocab, cfg_weight):
    guided = cfg_weight != 1.0
    cond, uncond = branches(vocab, scale=1.5 if guided else 8.0, dtype=dtype)  # guided or not, |z| <= 50
    given = {"logits": cond} | ({"uncond_logits": uncond} if guided else {})
    target, heat = words(vocab, NUM_ROWS), torch.linspace(1, 2, NUM_ROWS, device=DEVICE)

    def ask(function, values, rows):
        part = {name: value[rows] for name, value in values.items()}
        settings = {"cfg_weight": cfg_weight, "temperature": heat[rows], "return_entropy": True}
        return function(part.pop("logits"), target[rows], **part, **settings)

    narrow, wide = leaves(given), leaves(given, torch.float64)
    found = ask(selective_log_prob, narrow, ALL)
    log_prob, entropy, slopes = in_float64(lambda rows: ask(reference.selective_log_prob, wide, rows), wide)
    assert error(found.log_prob, log_prob) <= 2e-5
    assert error(found.entropy, entropy) <= 1e-5
    for name, mine, theirs in zip(given, gradients(found, narrow), slopes, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, theirs) <= GRADIENT_BOUNDS[dtype], name


@each_dtype
@pytest.mark.parametrize(
    ("vocab", "width", "workspace"),
    [(16384, 2048, None), (16385, 2048, 2**26), (50257, 1600, None), (102400, 2048, 2**26)],
)
@pytest.mark.parametrize("guidance", [None, "default", "exact"])
def test_log_probs_of_a_head_equal_float64(dtype, vocab, width, workspace, guidance):
    given = head(vocab, width, dtype, guided=guidance is not None, spread=3.0 if guidance is None else 1.0)
    narrow, wide = leaves(given), leaves(given, torch.float64)
    target, heat = words(vocab, NUM_ROWS), torch.linspace(0.8, 1.6, NUM_ROWS, device=DEVICE)

    def replay(rows):
        values = rounded(wide, narrow) if guidance == "default" else wide
        return ask_head(reference.linear_log_prob, values, target, rows, temperature=heat[rows])

    settings = {"precision": guidance or "default", "workspace_bytes": workspace}
    found = ask_head(linear_log_prob, narrow, target, temperature=heat, **settings)
    log_prob, entropy, slopes = in_float64(replay, wide)
    assert error(found.log_prob, log_prob) <= HEAD_BOUNDS[dtype]
    assert error(found.entropy, entropy) <= HEAD_BOUNDS[dtype]
    for name, mine, theirs in zip(given, gradients(found, narrow), slopes, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, theirs) <= GRADIENT_BOUNDS[dtype], name


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_equals_float64(ratio, kl, dual_clip):
    given, mask = policy_batch(192, 700)
    settings = {"kl": kl, "ratio": ratio, "dual_clip": dual_clip, "agg": "seq_mean_token_mean"}

    def ask(values, backend):
        found = policy_loss(**values, mask=mask, kl_coef=0.04, entropy_coef=0.01, backend=backend, **settings)
        return found, torch.autograd.grad(found.loss, [values["log_prob"], values["entropy"]])

    found, mine = ask(leaves(given), "triton")
    wanted, theirs = ask(leaves(given, torch.float64), "torch")
    assert error(found.loss, wanted.loss) <= 1e-6
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, theirs, strict=True))
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-2), name


@pytest.mark.parametrize("baseline", ["mean", "loo", "none"])
@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_advantages_of_a_thousand_groups_equal_float64(baseline, scale, shuffled):
    rewards = random(1024 * 16, seed=0, scale=0.01) + 20.1
    rewards[32:48] = 20.1
    rewards[::7] = torch.nan
    groups = words(1024, 1024 * 16) if shuffled else 16
    found, counted = group_advantages(rewards, groups, baseline=baseline, scale=scale, backend="triton")
    wanted, theirs = group_advantages(rewards.double(), groups, baseline=baseline, scale=scale, backend="torch")
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(counted, theirs)


# ---- memory ----


@pytest.mark.parametrize("workspace", [2**30, 2**31])
@pytest.mark.parametrize("learns", ["nothing", "hidden", "hidden and weight"])
def test_a_head_stays_within_its_workspace(workspace, learns):
    hidden = random(8192, 2048, seed=0, dtype=torch.bfloat16).requires_grad_(learns != "nothing")
    weight = random(102400, 2048, seed=1, scale=0.05, dtype=torch.bfloat16).requires_grad_("weight" in learns)
    target = words(102400, 8192)

    def ask():
        found = linear_log_prob(hidden, weight, target, return_entropy=True, workspace_bytes=workspace)
        inputs = [value for value in (hidden, weight) if value.requires_grad]
        total = found.log_prob.sum() + found.entropy.sum()
        return torch.autograd.grad(total, inputs) if inputs else (found.log_prob, found.entropy)

    # Beside the blocks: hidden's gradient summed in float32, and 64 MiB for cuBLASLt and the rows' statistics.
    summed = 4 * hidden.numel() if "weight" in learns else 0
    assert extra_memory(ask) <= workspace + summed + 2**26


def test_log_probs_of_logits_take_no_second_copy_of_them():
    logits, target = random(4099, 102400, seed=0).requires_grad_(), words(102400, 4099)

    def ask():
        return torch.autograd.grad(selective_log_prob(logits, target).log_prob.sum(), [logits])

    assert extra_memory(ask) <= 2**20


def test_more_than_two_billion_logits():
    num_rows, vocab = 20975, 102400
    assert num_rows * vocab > 2**31
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 5 * num_rows * vocab:
        pytest.skip("needs 10.7 GB of free memory on the CUDA device")
    logits = torch.empty(num_rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    logits.normal_(0, 6, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
    target = words(vocab, num_rows)
    found = selective_log_prob(logits, target, return_entropy=True)
    [slope] = torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), [logits])
    for rows in (slice(0, 8), slice(-8, None)):
        wide = logits[rows].detach().double().requires_grad_()
        wanted = reference.selective_log_prob(wide, target[rows], return_entropy=True)
        [theirs] = torch.autograd.grad(wanted.log_prob.sum() + wanted.entropy.sum(), [wide])
        assert error(found.log_prob[rows], wanted.log_prob) <= 2e-5
        assert error(found.entropy[rows], wanted.entropy) <= 1e-5
        assert relative(slope[rows], theirs) <= 4e-3


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # of sums, not of memory
def test_every_element_is_written():
    problem = a_whole_problem()
    plain = everything(*problem)
    with poisoned():
        found = everything(*problem)
    assert all(relative(a, b) <= 1e-6 for a, b in zip(found, plain, strict=True))


def test_views_give_what_their_copies_give():
    target = words(16385, 3 * 41 + 1)[1:].view(3, 41)
    assert target.data_ptr() % 16 == 8
    views = [
        random(3, 41, 16387, seed=0, scale=6)[..., :-2],
        random(130, 3, 41, seed=1).permute(1, 2, 0),
        random(16385, 260, seed=2, scale=0.1)[:, ::2],
    ]
    copies = [value.clone(memory_format=torch.contiguous_format) for value in views]

    def ask(inputs, target):
        logits, hidden, weight = (value.requires_grad_() for value in inputs)
        found = [selective_log_prob(logits, target).log_prob, linear_log_prob(hidden, weight, target).log_prob]
        return found, torch.autograd.grad(found[0].sum() + found[1].sum(), inputs)

    found, mine = ask(views, target)
    wanted, theirs = ask(copies, target.clone())
    assert all(error(a, b) <= 2e-5 for a, b in zip(found, wanted, strict=True))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, theirs, strict=True))


# ---- torch's machinery around the kernels ----


def test_ten_runs_have_the_same_bits():
    problem = a_whole_problem()
    first = everything(*problem)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(everything(*problem), first, strict=True))


@pytest.mark.filterwarnings("ignore")  # the compiler's own, such as of TensorFloat32
def test_a_compiled_step_has_the_same_values():
    batch, mask = policy_batch(16, 64)
    rest = {name: value for name, value in batch.items() if name not in ("log_prob", "entropy")}
    target = words(16385, 16, 64)

    def step(hidden, weight):
        found = linear_log_prob(hidden, weight, target, mask=mask, return_entropy=True)
        return policy_loss(found.log_prob, **rest, mask=mask, entropy=found.entropy, kl_coef=0.1, entropy_coef=0.1).loss

    inputs = [random(16, 64, 256, seed=7), random(16385, 256, seed=8, scale=0.05)]
    inputs = [value.to(torch.bfloat16).requires_grad_() for value in inputs]
    loss, compiled = step(*inputs), torch.compile(step, fullgraph=True)(*inputs)
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-5)
    slopes = [torch.autograd.grad(value, inputs) for value in (compiled, loss)]
    assert all(relative(a, b) <= 4e-3 for a, b in zip(*slopes, strict=True))


@pytest.mark.parametrize("from_logits", [True, False])
def test_a_captured_graph_answers_for_new_inputs(from_logits):
    width = 16385 if from_logits else 256
    inputs, weight = random(64, width, seed=0), random(16385, 256, seed=1, scale=0.1)
    target = words(16385, 64)

    def ask():
        if from_logits:
            return selective_log_prob(inputs, target, return_entropy=True)
        return linear_log_prob(inputs, weight, target, return_entropy=True, workspace_bytes=2**21)

    ask()  # compiles; a capture records launches only, and fails where the host waits for the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ask()
    inputs.copy_(random(64, width, seed=2))
    graph.replay()
    wanted = ask()
    assert error(found.log_prob, wanted.log_prob) <= 1e-5
    assert error(found.entropy, wanted.entropy) <= 1e-5


def test_work_goes_to_the_current_stream():
    given, target, _ = a_whole_problem()
    here, side = everything(given, target), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)  # cycles: what does not queue behind it reads the copies before they are made
        there = everything(leaves(given), target)
    torch.cuda.current_stream().wait_stream(side)
    assert all(relative(a, b) <= 1e-5 for a, b in zip(there[:4], here[:4], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_be_on_the_current_device():
    batch, mask = policy_batch(8, 64)
    given = batch | {"mask": mask}
    hidden, weight, target = random(64, 256, seed=7), random(16385, 256, seed=8, scale=0.1), words(16385, 64)

    def ask(device):
        there = {name: value.to(device) for name, value in given.items()}
        logits = linear_log_prob(hidden.to(device), weight.to(device), target.to(device)).log_prob
        return logits, policy_loss(**there).loss, group_advantages(there["advantages"], 4)[0]

    assert all(error(a.to(DEVICE), b) <= 1e-5 for a, b in zip(ask("cuda:1"), ask("cuda:0"), strict=True))


@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # torch 2.9 says so where a switch is read
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_no_switch_of_matrix_products_is_left_changed(precision):
    def switches():
        matmul = torch.backends.cuda.matmul
        return (
            torch.get_float32_matmul_precision(), matmul.allow_tf32, matmul.fp32_precision,
            matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction,
            torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.allow_tf32,
        )  # fmt: skip

    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = switches()
        everything(*a_whole_problem())
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision(usual)


def test_autocast_leaves_float32_alone():
    hidden, weight, target = random(64, 256, seed=0), random(16385, 256, seed=1, scale=0.1), words(16385, 64)
    plain = linear_log_prob(hidden, weight, target).log_prob
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = linear_log_prob(hidden, weight, target).log_prob
    assert torch.equal(found, plain)
