"""The diffusion renderer on a GPU: ratios of 1, a step of adapters, and trained steps that stream."""

import math

import pytest
import torch
from attrs import evolve
from tests.renderers import tiny_pipelines

from reasonrl.batch import Row, collate, passes, trained_mask
from reasonrl.bench import denoise
from reasonrl.bench.denoisers import OURS, STRAIGHT, WHOLE, Job
from reasonrl.bench.sd3 import MODELS
from reasonrl.loop import pass_loss
from reasonrl.noise import Draw
from reasonrl.objectives import DenoisingGRPO
from reasonrl.renderers import Diffusion
from reasonrl.types import Prompt, Trajectory
from reasonrl.weights import Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest tests/gpu` on one"),
]
DEVICE = torch.device("cuda")
LEAVES = [Trajectory(Prompt(name, name), (g,)) for name in ("a red circle", "two crosses") for g in range(4)]
JOB = Job(group=4, steps=6, trained=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of Stable Diffusion 3 with random weights."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipelines.stable_diffusion_3().save_pretrained(path)
    return path


def drawn(renderer):
    """Returns credited rows of two groups."""
    credit = torch.randn(len(LEAVES), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Row(t, {"image": one}, {"image": 0}, frozenset({"image"}))
        for t, one in zip(renderer.render(LEAVES, draw=Draw(0, 0)), credit, strict=True)
    ]


def gaps(renderer):
    """Returns replayed less sampled log-probs of every recorded step."""
    rows = drawn(renderer)
    batch = collate(rows, renderer.stages, device=DEVICE)
    with torch.no_grad():
        found = renderer.replay(batch, {"image": frozenset({"log_probs"})})["image"].log_probs
    assert found.device.type == DEVICE.type
    return (found - batch.stages["image"].log_probs)[batch.stages["image"].mask]


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_ratio_is_1_in_float32(guidance, folder):
    renderer = Diffusion(str(folder), guidance=guidance)
    assert next(renderer.module.parameters()).device.type == DEVICE.type
    found = gaps(renderer)
    assert len(found) == 10 * len(LEAVES)
    assert found.exp().sub(1).abs().max() <= 1e-4


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_ratio_in_bfloat16_is_near_1(storage, folder, record_property):
    """Rows of a larger batch are rounded differently: the gap is what a clip range of 1e-4 has to live with."""
    found = gaps(Diffusion(str(folder), guidance=4.5, dtype="bfloat16", storage=storage)).abs()
    record_property("mean |ln ratio|", float(found.mean()))
    record_property("largest |ln ratio|", float(found.max()))
    print(f"bfloat16 weights, {storage} latents: |ln ratio| {found.mean():.1e} in the mean, {found.max():.1e} at most")
    assert found.mean() <= 0.02


def test_a_step_of_adapters_moves_them_alone_and_then_the_ratio(folder):
    renderer = Diffusion(str(folder), dtype="bfloat16", lora_rank=4)
    named = dict(renderer.module.named_parameters())
    learning = {name: p for name, p in named.items() if p.requires_grad}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in named.items()}
    rows = drawn(renderer)
    claims, weights = {("image",): DenoisingGRPO(clip=0.2)}, Weights(renderer, {})
    counts = {claim: objective.count(trained_mask(rows, claim)) for claim, objective in claims.items()}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2, weight_decay=0.0)

    def total():
        whole = 0.0
        for share, batch in passes(rows, renderer, num_rows=3, num_actions=2, whole_groups=False, device=DEVICE):
            loss, _ = pass_loss(claims, renderer, batch, weights, counts)
            (share * loss).backward()
            whole += float(loss.detach())
        return whole

    first = total()
    optimizer.step()
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    # The other halves' gradients begin at 0, and that of the last layer's queries of text is 0: nothing reads them.
    assert moved == {n for n in learning if ".lora_B." in n and "blocks.1.attn.add_q_proj" not in n}
    assert math.isfinite(first)
    assert total() < first - 1e-3


@pytest.mark.parametrize("keep_on", ["host", "device"])
def test_what_was_drawn_waits_where_it_was_asked_to(keep_on, folder):
    row = drawn(Diffusion(str(folder), keep_on=keep_on))[0]
    segment = row.trajectory.segments["image"]
    places = {segment.actions.device.type, segment.context["start"].device.type, segment.context["clean"].device.type}
    assert places == {"cpu" if keep_on == "host" else DEVICE.type}
    embeds = next(value for name, value in segment.context.items() if name.endswith("/embeds"))
    assert embeds.device.type == ("cpu" if keep_on == "host" else DEVICE.type)


@pytest.mark.parametrize("dtype", denoise.TOLERANCES)
def test_gradients_are_those_of_the_straight_loop(dtype):
    assert denoise.gradient_gap(MODELS["small"], dtype, JOB, DEVICE) < denoise.TOLERANCES[dtype]


def test_streaming_lowers_the_peak_of_allocated_memory():
    ours, whole, straight = (
        denoise.take(MODELS["small"], name, "bfloat16", JOB, DEVICE) for name in (OURS, WHOLE, STRAIGHT)
    )
    assert ours.kept == pytest.approx(whole.kept / JOB.trained, rel=0.02)
    assert ours.peak < 0.5 * whole.peak
    assert ours.peak < 1.2 * straight.peak


def test_what_streams_does_not_grow_with_the_steps():
    few, many = (
        denoise.take(MODELS["small"], OURS, "bfloat16", evolve(JOB, trained=trained), DEVICE).peak
        for trained in (1, JOB.steps)
    )
    assert many < 1.1 * few
