"""GoT-R1's contract: what was sampled is what is replayed, and transformers draws the same."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, JanusForConditionalGeneration

from reasonrl import CheckpointError, ConfigError, DataError, Draw, Prompt, Trajectory
from reasonrl.batch import Row, collate
from reasonrl.policies import GoTR1
from reasonrl.scenes import compose
from reasonrl.types import Stop

PROMPTS = [
    Prompt("a", "a circle"),
    Prompt("b", "a striped red circle on the left of a blue square"),
    Prompt("c", "three green crosses and one yellow diamond"),
]
BOTH = frozenset({"log_probs", "entropy"})


def replayed(policy, trajectories, stages=("reasoning", "image")):
    rows = [Row(t, {}, {}, frozenset(policy.stages)) for t in trajectories]
    batch = collate(rows, policy.stages)
    with torch.no_grad():
        return batch, policy.replay(batch, dict.fromkeys(stages, BOTH))


def test_rows_do_not_depend_on_the_other_rows():
    policy = GoTR1("nano", guidance=5.0, max_tokens=40)
    together = policy.sample(PROMPTS, group_size=2, draw=Draw(3, 7))
    alone = policy.sample(PROMPTS[1:2], group_size=2, draw=Draw(3, 7))
    for a, b in zip(together[2:4], alone, strict=True):
        assert a.reasoning == b.reasoning
        assert torch.equal(a.segments["image"].actions, b.segments["image"].actions)


def test_the_step_and_the_member_change_the_draw():
    policy = GoTR1("nano", guidance=1.0, max_tokens=40)
    first, second = policy.sample(PROMPTS[:1], group_size=2, draw=Draw(0, 0))
    (later,) = policy.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 1))
    images = [t.segments["image"].actions for t in (first, second, later)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_reasoning_that_runs_out_of_tokens_is_closed_by_a_forced_token():
    policy = GoTR1("nano", guidance=1.0, max_tokens=3)
    for trajectory in policy.sample(PROMPTS, group_size=1, draw=Draw(0, 0)):
        segment = trajectory.segments["reasoning"]
        assert trajectory.stop is Stop.LENGTH
        assert segment.actions[-1] == policy.special.begin_image
        assert segment.mask.tolist() == [True, True, False]
        assert len(trajectory.segments["image"].actions) == 64


def test_replay_of_one_stage_alone_equals_replay_of_both():
    policy = GoTR1("nano", guidance=5.0, max_tokens=40)
    drawn = policy.sample(PROMPTS, group_size=1, draw=Draw(0, 0))
    _, both = replayed(policy, drawn)
    for stage in policy.stages:
        batch, alone = replayed(policy, drawn, (stage,))
        mask = batch.stages[stage].mask
        assert set(alone) == {stage}
        torch.testing.assert_close(alone[stage].log_probs[mask], both[stage].log_probs[mask], atol=1e-5, rtol=0)


def test_a_row_without_an_image_replays_its_reasoning():
    policy = GoTR1("nano", guidance=5.0, max_tokens=40)
    drawn = policy.sample(PROMPTS, group_size=1, draw=Draw(0, 0))
    _, whole = replayed(policy, drawn)
    half = [evolve(drawn[0], segments={"reasoning": drawn[0].segments["reasoning"]}), *drawn[1:]]
    batch, found = replayed(policy, half)
    for stage in policy.stages:
        mask = batch.stages[stage].mask
        torch.testing.assert_close(found[stage].log_probs[mask], whole[stage].log_probs[mask], atol=1e-5, rtol=0)


def test_greedy_image_tokens_equal_those_of_transformers_own_generate():
    policy = GoTR1("nano", guidance=5.0, temperature=1e-4, max_tokens=40)
    (drawn,) = policy.sample(PROMPTS[1:2], group_size=1, draw=Draw(0, 0))
    reasoning = drawn.segments["reasoning"]
    ids = torch.cat([reasoning.context["prompt_ids"], reasoning.actions])[None]
    model, special = policy.module.model, policy.special
    expected = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        generation_config=GenerationConfig(
            do_sample=False,
            guidance_scale=5.0,
            pad_token_id=special.pad,
            bos_token_id=special.begin_text,
            generation_kwargs={"boi_token_id": special.begin_image},
        ),
    )
    assert torch.equal(drawn.segments["image"].actions, expected[0])


def test_greedy_reasoning_equals_transformers_own_generate():
    policy = GoTR1("nano", guidance=1.0, temperature=1e-4, max_tokens=40)
    (drawn,) = policy.sample(PROMPTS[1:2], group_size=1, draw=Draw(0, 0))
    reasoning = drawn.segments["reasoning"]
    ids = reasoning.context["prompt_ids"][None]
    expected = policy.module.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="text",
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=policy.special.pad,
        eos_token_id=policy.special.begin_image,
    )
    assert torch.equal(reasoning.actions, expected[0, ids.shape[1] :])


def test_demonstrations_encode_to_what_sampling_would_have_recorded():
    policy = GoTR1("nano", guidance=1.0, max_tokens=60, blank_frac=0.0)
    import numpy as np

    shown = compose.demonstration(PROMPTS[1].text, np.random.default_rng(0), compose.NO_FAULTS)
    lesson = Trajectory(
        PROMPTS[1],
        (0,),
        texts={"reasoning": shown.plan_text},
        artifacts={"image_tokens": shown.tokens},
    )
    (encoded,) = policy.encode([lesson])
    segment = encoded.segments["reasoning"]
    assert policy.tokenizer.decode(segment.actions[:-1]) == shown.plan_text
    assert segment.actions[-1] == policy.special.begin_image
    assert encoded.segments["image"].actions.tolist() == shown.tokens.tolist()
    assert segment.log_probs is None


def test_blanked_demonstrations_train_the_image_under_the_unconditional_prefix():
    policy = GoTR1("nano", guidance=1.0, max_tokens=60, blank_frac=1.0)
    drawn = policy.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))
    lesson = evolve(drawn[0], segments={}, artifacts={"image_tokens": drawn[0].segments["image"].actions})
    (blank,) = policy.encode([lesson])
    assert not blank.segments["reasoning"].mask.any()
    _, found = replayed(policy, [blank])
    guided = evolve(policy, guidance=0.0)  # w = 0 is the unconditional branch
    seen = evolve(policy, blank_frac=0.0).encode([lesson])
    _, expected = replayed(guided, seen)
    torch.testing.assert_close(found["image"].log_probs, expected["image"].log_probs, atol=1e-4, rtol=0)


def test_a_variant_shares_the_loaded_weights():
    policy = GoTR1("nano")
    assert evolve(policy, guidance=1.0).module is policy.module


def test_a_saved_model_loads_with_transformers_alone_and_draws_the_same(tmp_path):
    policy = GoTR1("nano", guidance=1.0, max_tokens=40)
    policy.save(tmp_path)
    JanusForConditionalGeneration.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    again = GoTR1(str(tmp_path), guidance=1.0, max_tokens=40)
    first, second = (p.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))[0] for p in (policy, again))
    assert first.reasoning == second.reasoning


def test_unknown_words_and_control_tokens_are_refused_by_prompt_id():
    policy = GoTR1("nano")
    wrong = [Prompt("mine.txt:3", "a teal vase"), Prompt("mine.txt:5", "a <begin_of_image> circle")]
    with pytest.raises(
        DataError, match=r"mine\.txt:3 \(unknown word 'teal', 'vase'\); mine\.txt:5 \(contains"
    ) as error:
        policy.check(wrong)
    assert "\n" not in str(error.value)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"\{prompt\}"):
        GoTR1("nano", template="draw it")
    with pytest.raises(ValueError, match="temperature"):
        GoTR1("nano", temperature=0.0)


def test_broken_checkpoints_are_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        GoTR1(str(tmp_path / "nowhere")).module  # noqa: B018
    policy = GoTR1("nano")
    policy.save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated") as error:
        GoTR1(str(tmp_path / "cut")).module  # noqa: B018
    assert "\n" not in str(error.value)
    policy.save(tmp_path / "foreign")
    save_file(
        {"something.else": torch.zeros(3)},
        tmp_path / "foreign" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        GoTR1(str(tmp_path / "foreign")).module  # noqa: B018


def test_the_packaged_checkpoint_is_small_and_has_no_pickle():
    from importlib.resources import files

    folder = files("reasonrl.scenes") / "nano"
    names = {entry.name for entry in folder.iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert sum(len((folder / name).read_bytes()) for name in names) <= 8_000_000
    assert load_file(str(folder / "model.safetensors"))
