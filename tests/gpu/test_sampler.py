"""The sampler and the packed replay on a GPU: captured graphs, flash attention, and the CPU's answers."""

import pytest
import torch
from attrs import evolve

from reasonrl import Draw, Prompt
from reasonrl.batch import Row, collate
from reasonrl.noise import uniform
from reasonrl.policies import GoTR1
from reasonrl.policies.janus_sampler import Sampler
from reasonrl.policies.packed_attention import Runs, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; docs/benchmarks.md has the figures"),
]
PROMPTS = [
    Prompt("a", "a circle"),
    Prompt("b", "a striped red circle on the left of a blue square"),
    Prompt("c", "three green crosses and one yellow diamond"),
]
NEEDS = {stage: frozenset({"log_probs"}) for stage in ("reasoning", "image")}


def on_gpu(**fields):
    policy = GoTR1("nano", **{"guidance": 5.0, "max_tokens": 80, **fields})
    policy.module.cuda()
    return policy


def replayed(policy, trajectories):
    rows = [Row(t, {}, {}, frozenset(policy.stages)) for t in trajectories]
    batch = collate(rows, policy.stages, device=torch.device("cuda"))
    return batch, policy.replay(batch, NEEDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_ratio_is_1(dtype, guidance):
    policy = on_gpu(dtype=dtype, guidance=guidance)
    trajectories = policy.sample(PROMPTS, group_size=8, draw=Draw(0, 0))
    for packed in (True, False):
        with torch.no_grad():
            batch, found = replayed(evolve(policy, packed=packed), trajectories)
        for name, stage in batch.stages.items():
            gap = (found[name].log_probs - stage.log_probs)[stage.mask]
            off = gap.exp().sub(1).abs()
            assert off.mean() <= (1e-4 if dtype == "float32" else 0.03), f"{name}, packed={packed}"
            assert (off > 0.2).float().mean() <= (0.0 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("per_plan", [1, 2])
def test_captured_graphs_draw_what_eager_steps_draw(per_plan):
    policy = on_gpu()
    ids = [policy._prompt_ids(p.text) for p in PROMPTS]
    drawn = []
    for captures in (True, False):
        sampler = Sampler(policy.module, policy.special, guidance=5.0, temperature=1.0, captures=captures)
        text = uniform(range(12), policy.max_tokens)
        reasoned = sampler.reason(ids, 4, text)
        drawn.append((reasoned, sampler.images_of(reasoned, per_plan, uniform(range(12 * per_plan), 64))))
    (reasoned, images), (eager, eager_images) = drawn
    assert torch.equal(reasoned.tokens.ids, eager.tokens.ids)
    assert torch.equal(reasoned.lengths, eager.lengths)
    assert torch.equal(images.ids, eager_images.ids)
    torch.testing.assert_close(images.log_probs, eager_images.log_probs, atol=1e-3, rtol=0)


def test_greedy_tokens_are_the_cpus():
    here, there = GoTR1("nano", guidance=5.0, temperature=1e-4, max_tokens=40), on_gpu(temperature=1e-4, max_tokens=40)
    one, other = (p.sample(PROMPTS, group_size=1, draw=Draw(0, 0)) for p in (here, there))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.reasoning == theirs.reasoning
        same = mine.segments["image"].actions == theirs.segments["image"].actions
        assert same.float().mean() >= 0.95  # a near tie may fall the other way, and what follows it with it


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_packed_runs_is_dense_attention(dtype, heads):
    """Flash attention is causal from the end where a run has more keys than queries."""
    runs = Runs((0, 7, 40, 41, 60), ((), ((0, 7),), ((0, 3),), ((0, 7), (7, 40))), torch.device("cuda"))
    seen = torch.zeros(60, 60, dtype=torch.bool, device="cuda")
    for (start, stop), before in zip(zip(runs.cuts, runs.cuts[1:], strict=False), runs.before, strict=True):
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start, device="cuda").tril().bool()
        for first, last in before:
            seen[start:stop, first:last] = True
    query, key, value = (
        torch.randn(1, h, 60, 64, device="cuda", dtype=dtype, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=seen, scale=0.1, enable_gqa=heads[0] != heads[1]
    )
    found, _ = attend(None, query, key, value, None, runs=runs, scaling=0.1)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), atol=limit, rtol=limit)
    slope = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, (query, key, value), slope.transpose(1, 2).to(dtype))
    for one, other in zip(mine, torch.autograd.grad(wanted, (query, key, value), slope), strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=3 * limit, rtol=limit)


def test_packed_and_padded_gradients_agree():
    policy = on_gpu(dtype="float32")
    trajectories = policy.sample(PROMPTS, group_size=4, draw=Draw(0, 0))
    slopes = []
    for packed in (True, False):
        policy.module.zero_grad()
        _, found = replayed(evolve(policy, packed=packed), trajectories)
        sum(replay.log_probs.sum() for replay in found.values()).backward()
        slopes.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    scale = max(s.abs().max() for s in slopes[1].values())
    for name, slope in slopes[1].items():
        torch.testing.assert_close(slopes[0][name], slope, atol=float(1e-4 * scale), rtol=1e-3, msg=name)
