"""Packed replay against its slow twin, padded rows, and against dense attention."""

import json
from itertools import pairwise

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reasonrl import Draw, Prompt, Trajectory
from reasonrl.batch import Row, collate
from reasonrl.policies import GoTR1
from reasonrl.policies.layout import laid_out
from reasonrl.policies.packed_attention import Runs, attend

PROMPTS = [
    Prompt("a", "a circle"),
    Prompt("b", "a striped red circle on the left of a blue square"),
    Prompt("c", "three green crosses and one yellow diamond"),
]
BOTH = {stage: frozenset({"log_probs", "entropy"}) for stage in ("reasoning", "image")}
LOCAL = torch.device("cpu")


def batch_of(trajectories, stages=("reasoning", "image")):
    return collate([Row(t, {}, {}, frozenset(stages)) for t in trajectories], ("reasoning", "image"))


def drawn(**fields):
    policy = GoTR1("nano", **{"guidance": 5.0, "max_tokens": 24, **fields})
    return policy, policy.sample(PROMPTS, group_size=4, draw=Draw(0, 0))


def answers(policy, batch, needs=BOTH):
    """Returns log-probs, entropies, and every gradient of a weighted sum of both."""
    policy.module.zero_grad()
    found = policy.replay(batch, needs)
    noise = torch.Generator().manual_seed(0)
    values = [v for replay in found.values() for v in (replay.log_probs, replay.entropy)]
    sum((v * torch.randn(v.shape, generator=noise)).sum() for v in values).backward()
    slopes = {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}
    return [v.detach() for v in values], slopes


def assert_twins(policy, batch, needs=BOTH):
    (mine, my_slopes), (wanted, slopes) = (answers(evolve(policy, packed=p), batch, needs) for p in (True, False))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # guidance 5 amplifies float error
    assert my_slopes.keys() == slopes.keys()
    scale = max(slope.abs().max() for slope in slopes.values())
    for name, slope in slopes.items():
        torch.testing.assert_close(my_slopes[name], slope, atol=5e-5 * scale, rtol=1e-3, msg=name)


# ---- attention ----


@st.composite
def lines(draw):
    """Cuts of a line, and for each run some ranges of the runs before it."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    cuts = [0]
    before = []
    for size in sizes:
        ranges = []
        for start, stop in pairwise(cuts):
            if draw(st.booleans()):
                ranges.append((start, draw(st.integers(start + 1, stop))))
        before.append(tuple(ranges))
        cuts.append(cuts[-1] + size)
    return Runs(tuple(cuts), tuple(before), LOCAL)


@settings(max_examples=60, deadline=None)
@given(lines(), st.sampled_from([(4, 4), (4, 2)]), st.integers(0, 2**31))
def test_each_run_sees_itself_and_what_it_names(runs, heads, seed):
    noise = torch.Generator().manual_seed(seed)
    length = runs.cuts[-1]
    query, key, value = (
        torch.randn(1, h, length, 8, generator=noise, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    )
    seen = torch.zeros(length, length, dtype=torch.bool)
    for (start, stop), before in zip(pairwise(runs.cuts), runs.before, strict=True):
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        for first, last in before:
            seen[start:stop, first:last] = True
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    found, _ = attend(None, query, key, value, None, runs=runs, scaling=0.3)
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=1e-12, rtol=1e-9)
    slope = torch.randn(wanted.shape, generator=noise, dtype=torch.float64)
    mine = torch.autograd.grad(found, (query, key, value), slope.transpose(1, 2))
    for one, other in zip(mine, torch.autograd.grad(wanted, (query, key, value), slope), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(lines())
def test_flash_attention_is_given_the_same_keys(runs):
    for run, (start, stop) in enumerate(pairwise(runs.cuts)):
        places = runs.key_places[runs.key_cuts[run] : runs.key_cuts[run + 1]].tolist()
        assert places == [p for r in (*runs.before[run], (start, stop)) for p in range(*r)]
        assert runs.query_cuts[run + 1] - runs.query_cuts[run] == runs.lengths[0][run]
        assert len(places) == runs.lengths[1][run]


# ---- packed = padded ----


@pytest.mark.parametrize("mode", ["guided", "detached", "conditional"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_packed_rows_are_padded_rows(mode, guidance):
    policy, trajectories = drawn(guidance=guidance, log_probs=mode)
    assert len({len(t.segments["reasoning"].actions) for t in trajectories}) > 1
    assert_twins(policy, batch_of(trajectories))


def test_rows_that_share_plans_are_padded_rows():
    policy, trajectories = drawn(images_per_plan=2)
    assert_twins(policy, batch_of(trajectories))


def test_one_stage_alone_a_missing_image_and_partly_trained_rows():
    policy, trajectories = drawn()
    for stage in BOTH:
        assert_twins(policy, batch_of(trajectories), {stage: BOTH[stage]})
    first = trajectories[0]
    half = [evolve(first, segments={"reasoning": first.segments["reasoning"]}), *trajectories[1:]]
    assert_twins(policy, batch_of(half))
    assert_twins(policy, batch_of(trajectories, stages=("image",)))


def test_blanked_demonstrations_and_others_in_one_batch():
    policy, trajectories = drawn()
    lessons = [
        Trajectory(t.prompt, t.member, texts=t.texts, artifacts={"image_tokens": t.segments["image"].actions})
        for t in trajectories
    ]
    encoded = [evolve(policy, blank_frac=float(i % 2)).encode([lesson])[0] for i, lesson in enumerate(lessons)]
    assert {bool(t.segments["image"].context["blank"]) for t in encoded} == {True, False}
    for guidance in (1.0, 5.0):
        assert_twins(evolve(policy, guidance=guidance), batch_of(encoded))


def test_adapters_and_recomputed_layers():
    policy, trajectories = drawn(lora_rank=4, gradient_checkpointing=True)
    assert_twins(policy, batch_of(trajectories))


def test_prompts_and_plans_that_are_equal_only_one_behind_the_other_stay_apart():
    policy, (whole, *_) = drawn(max_tokens=8)
    plan = whole.segments["reasoning"]
    prompt = plan.context["prompt_ids"]
    moved = evolve(
        plan,
        actions=torch.cat([prompt[-2:], plan.actions]),
        mask=torch.cat([torch.ones(2, dtype=torch.bool), plan.mask]),
        log_probs=None,
        context={"prompt_ids": prompt[:-2]},
    )
    other = evolve(whole, prompt=Prompt("z", "other"), segments={"reasoning": moved, "image": whole.segments["image"]})
    for rows in ([whole, other], [other, whole]):
        assert_twins(policy, batch_of(rows))


# ---- what packing saves ----


@pytest.mark.parametrize("per_plan", [1, 2])
def test_a_packed_line_holds_what_is_shared_once_and_no_padding(per_plan):
    policy, trajectories = drawn(images_per_plan=per_plan)
    batch = batch_of(trajectories)
    found = laid_out(batch, BOTH, policy.special, guided=True, packed=True, apart=False)
    prompts = {t.prompt.id: len(t.segments["reasoning"].context["prompt_ids"]) for t in trajectories}
    plans = {(t.prompt.id, t.segments["reasoning"].member): len(t.segments["reasoning"].actions) for t in trajectories}
    prefix = max(prompts[t.prompt.id] + len(t.segments["reasoning"].actions) for t in trajectories) - 1
    images = len(trajectories) * (63 + 64)  # the unconditional branch adds its own begin-of-image
    assert len(plans) == len(trajectories) // per_plan
    assert found.line.source.shape == (1, sum(prompts.values()) + sum(plans.values()) + prefix + images)
    assert found.blind is None
    padded = laid_out(batch, BOTH, policy.special, guided=True, packed=False, apart=False)
    assert padded.line.source.numel() > 1.15 * found.line.source.numel()


def test_equal_prompts_and_plans_under_other_names_are_read_once():
    policy, trajectories = drawn()
    twice = [*trajectories, *(evolve(t, prompt=evolve(t.prompt, id=f"again {t.prompt.id}")) for t in trajectories)]
    sizes = [
        laid_out(batch_of(rows), {"reasoning": BOTH}, policy.special, guided=True, packed=True, apart=False)
        for rows in (trajectories, twice)
    ]
    assert sizes[0].line.source.shape == sizes[1].line.source.shape


# ---- beside transformers ----


def test_a_saved_config_does_not_name_our_attention(tmp_path):
    GoTR1("nano").save(tmp_path)
    assert "reasonrl" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
