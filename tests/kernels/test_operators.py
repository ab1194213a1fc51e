"""What torch asks of an operator, which backend runs, and how logits are cut."""

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.backends import quiet
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from reasonrl.errors import ConfigError, ContractError
from reasonrl.kernels import linear_log_prob, policy_loss, selective_log_prob
from reasonrl.kernels.chunks import ALIGN, cpu_plan, plan
from reasonrl.kernels.log_prob_ops import linear_log_prob as linear_op
from reasonrl.kernels.log_prob_ops import logits_log_prob as logits_op
from reasonrl.kernels.policy import _policy_terms_op

pytestmark = quiet
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_the_logits_operator_passes_opcheck(triton, guided):
    uncond = torch.randn(4, 6, requires_grad=True) if guided else None
    given = (
        torch.randn(4, 6, requires_grad=True),
        uncond,
        2.0,
        torch.tensor([0, 5, -1, 2]),
        torch.ones(4),
        True,
        triton,
    )
    opcheck(logits_op, given, test_utils=CHECKS)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_linear_operator_passes_opcheck(triton, whole):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    rest = (leaf(7), leaf(4, 2), leaf(7, 2)) if whole else (None, None, None)
    weight = leaf(7, 3) if whole else torch.randn(7, 3)
    target, heat = torch.tensor([0, 6, -1, 2]), torch.ones(4)
    opcheck(linear_op, (leaf(4, 3), weight, *rest, target, heat, 4096, False, True, triton), test_utils=CHECKS)


def test_the_policy_operator_passes_opcheck():
    live, entropy = torch.randn(2, 5, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    mask = torch.rand(2, 5) > 0.3
    given = (
        live,
        torch.randn(2, 5),
        torch.randn(2),
        mask,
        torch.randn(2, 5),
        entropy,
        0.2,
        0.3,
        3.0,
        0.1,
        "k3",
        0.01,
        False,
    )
    opcheck(_policy_terms_op, given, test_utils=CHECKS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_compiles_a_head_that_is_a_transposed_view():
    hidden, head, target = torch.randn(4, 8), torch.randn(8, 40), torch.randint(40, (4,))
    hidden.requires_grad_()
    head.requires_grad_()

    def ask(hidden, head):
        return linear_log_prob(hidden, head.t(), target).log_prob.sum()

    with torch._inductor.config.patch(force_disable_caches=True):
        found = torch.autograd.grad(torch.compile(ask)(hidden, head), (hidden, head))
    for mine, wanted in zip(found, torch.autograd.grad(ask(hidden, head), (hidden, head)), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_compiled_graph_has_no_break_and_the_same_numbers():
    def ask(hidden, weight, target, mask):
        found = linear_log_prob(hidden, weight, target, mask=mask, return_entropy=True, temperature=0.5)
        return found.log_prob.sum() + found.entropy.sum()

    hidden, weight = torch.randn(3, 4, 8), torch.randn(50, 8)
    given = (hidden.requires_grad_(), weight, torch.randint(50, (3, 4)), torch.rand(3, 4) > 0.5)
    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*given), ask(*given), rtol=1e-5)
    slopes = [torch.autograd.grad(f(*given), [hidden])[0] for f in (compiled, ask)]
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-6)


def test_shapes_are_known_without_data():
    with FakeTensorMode():
        hidden, weight = torch.empty(2, 3, 8, requires_grad=True), torch.empty(50, 8)
        found = linear_log_prob(hidden, weight, torch.zeros(2, 3, dtype=torch.int64), return_entropy=True)
        found.log_prob.sum().backward()
        assert found.log_prob.shape == found.entropy.shape == (2, 3)
        assert hidden.grad.shape == hidden.shape


def test_triton_on_a_cpu_is_refused_and_says_why():
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    asks = [
        lambda backend: selective_log_prob(logits, target, backend=backend),
        lambda backend: linear_log_prob(logits, logits, target, backend=backend),
        lambda backend: policy_loss(logits, logits, torch.zeros(2), logits > 0, backend=backend),
    ]
    for ask in asks:
        with pytest.raises(ConfigError, match=r"backend='triton' needs tensors on a CUDA device, got cpu: move them"):
            ask("triton")
        with pytest.raises(ConfigError, match="backend must be 'auto', 'torch' or 'triton', got 'cuda'"):
            ask("cuda")


def test_a_sharded_tensor_is_refused():
    code = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh, Replicate
from reasonrl.errors import ContractError
from reasonrl.kernels import linear_log_prob
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
weight = DTensor.from_local(torch.zeros(9, 4), init_device_mesh("cpu", (1,)), [Replicate()])
try:
    linear_log_prob(torch.zeros(2, 4), weight, torch.zeros(2, dtype=torch.int64))
except ContractError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert "weight is a DTensor of (9, 4): call the kernels inside forward" in said.stdout, said.stderr


def test_importing_the_door_does_not_import_triton():
    code = "import sys, reasonrl.kernels; print('reasonrl.kernels.triton_log_prob' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.strip() == "False"


sizes = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.integers(1, 4096), st.integers(1, 2**24), st.booleans())
def test_a_plan_covers_every_logit_once_within_its_workspace(num_rows, vocab, width, workspace, learns):
    for found in (
        plan(num_rows, vocab, width, workspace=workspace, item=6, learns_weight=learns),
        cpu_plan(num_rows, vocab, width, workspace=workspace, learns_weight=False),
        cpu_plan(num_rows, vocab, width, workspace=workspace, learns_weight=True),
    ):
        blocks = found.blocks(num_rows, vocab)
        assert sum((v1 - v0) * (r1 - r0) for v0, v1, r0, r1 in blocks) == num_rows * vocab
        assert len({(v0, r0) for v0, _, r0, _ in blocks}) == len(blocks)
    gpu = plan(num_rows, vocab, width, workspace=workspace, item=6, learns_weight=learns)
    assert gpu.rows * gpu.cols <= max(workspace // 6, ALIGN * ALIGN)


def test_a_frozen_head_takes_whole_rows_and_a_learning_one_the_least_traffic():
    big = {"workspace": 2**30, "item": 6}
    frozen = plan(65536, 102400, 2048, learns_weight=False, **big)
    assert frozen.cols == 102400
    square = plan(65536, 102400, 2048, learns_weight=True, **big)
    assert 8000 < square.rows < 20000
    assert 8000 < square.cols < 20000
    assert plan(8192, 16384, 2048, learns_weight=True, **big).blocks(8192, 16384) == [(0, 16384, 0, 8192)]


def test_a_tensor_of_another_type_is_refused_by_triton():
    with pytest.raises((ContractError, ConfigError)):
        selective_log_prob(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), backend="triton")
