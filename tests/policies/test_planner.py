"""The planner's contract on tiny random models of many families: what was written is what is replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attrs import evolve
from peft import PeftModel
from PIL import Image
from tests.judges import tiny_vlm
from tests.policies.published_folder import write_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from reasonrl import CheckpointError, ConfigError, DataError, Draw, Prompt, Recipe, Trajectory
from reasonrl.batch import Row, collate
from reasonrl.judges import SceneSemantic
from reasonrl.objectives import GRPO, Supervised
from reasonrl.policies import GoTR1
from reasonrl.policies.planner import INSTRUCTION, Planner
from reasonrl.policies.planner_model import rectangle
from reasonrl.recipe import load_prompts
from reasonrl.session import run
from reasonrl.testing import check_policy
from reasonrl.types import Stop

PROMPTS = [
    Prompt("a", "a cup"),
    Prompt("b", "a striped red circle on the left of a blue square"),
    Prompt("c", "snow"),
]
BOTH = frozenset({"log_probs", "entropy"})
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
FAMILIES = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    # A soft cap and a scale that bend small logits too, and a window that prompts and plans outgrow.
    "gemma2": {**GROUPED, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {**SIZE, "num_key_value_heads": 2, "logit_scale": 0.3, "max_position_embeddings": 512},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},  # dropout 0.1, as published
}
VLMS: tuple[tiny_vlm.Family, ...] = ("qwen2_5_vl", "qwen3_vl")
PLAIN_HEAD = {"gemma2": False, "cohere": False}
CHAT = (
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ turn.role }}]{{ turn.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def stirred(model):
    """Moves weights so far from their start that positions, windows and pictures change what is said."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 1.3 * parameter.shape[1] ** -0.5)
    return model


def text_model(folder: Path, family: str, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, size=120)
    ends = {"vocab_size": 120, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **ends, **changes})
    stirred(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, one_thread):
    return {family: text_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def vlm_model(folder: Path, family: tiny_vlm.Family) -> Path:
    tokenizer = tiny_vlm.write_tokenizer(folder, ())
    tiny_vlm.write_processor(folder, family)
    config = AutoConfig.for_model(**tiny_vlm.settings(family, tokenizer))
    stirred(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm_folders(tmp_path_factory, one_thread):
    return {family: vlm_model(tmp_path_factory.mktemp(family), family) for family in VLMS}


@pytest.fixture(scope="module")
def vlm_folder(vlm_folders):
    return vlm_folders["qwen2_5_vl"]


def planner(folder, **settings):
    return Planner(str(folder), **{"instruction": "Plan it.", "max_tokens": 12, **settings})


def picture(shade: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).point([(level + shade) % 256 for level in range(256)]).convert("RGB")


SEEN = [
    Prompt("a", "what is it?", image=picture(0)),
    Prompt("b", "put a hat on it, and a dog beside it", image=picture(90, (112, 84))),
    Prompt("c", "a boat"),
]


def batched(policy, trajectories):
    return collate([Row(t, {}, {}, frozenset(policy.stages)) for t in trajectories], policy.stages)


def replayed(policy, trajectories):
    batch = batched(policy, trajectories)
    with torch.no_grad():
        return batch.stages["reasoning"], policy.replay(batch, {"reasoning": BOTH})["reasoning"]


def assert_ratio_is_1(policy, trajectories):
    stage, found = replayed(policy, trajectories)
    assert stage.mask.any()
    assert (found.log_probs - stage.log_probs)[stage.mask].abs().max() <= 1e-4
    recorded = torch.nn.utils.rnn.pad_sequence(stage.context["entropy"], batch_first=True)
    assert (found.entropy - recorded)[stage.mask].abs().max() <= 1e-4


# ---- on policy ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_replayed_is_what_was_drawn_from(folders, family, temperature):
    policy = planner(folders[family], temperature=temperature)
    assert policy.module.plain is PLAIN_HEAD.get(family, True)
    assert_ratio_is_1(policy, policy.sample(PROMPTS, group_size=3, draw=Draw(0, 0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_plain_forward_of_one_row(folders, family):
    policy = planner(folders[family], temperature=0.8)
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    for drawn in policy.sample(PROMPTS, group_size=2, draw=Draw(1, 0)):
        segment = drawn.segments["reasoning"]
        prompt = segment.context["prompt_ids"]
        with torch.no_grad():
            logits = model(torch.cat([prompt, segment.actions])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, segment.actions[:, None]).squeeze(1)
        torch.testing.assert_close(segment.log_probs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cold_plans_are_those_of_transformers_own_generate(folders, family):
    policy = planner(folders[family], temperature=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=2, do_sample=False)
    for drawn in policy.sample(PROMPTS, group_size=1, draw=Draw(0, 0)):
        segment = drawn.segments["reasoning"]
        ids = segment.context["prompt_ids"][None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, ids.shape[1] :]
        assert segment.actions.tolist() == expected.tolist()


def test_rows_do_not_depend_on_the_other_rows(folders):
    policy = planner(folders["gpt2"], max_tokens=40)
    together = policy.sample(PROMPTS, group_size=4, draw=Draw(3, 7))
    assert len({len(t.segments["reasoning"].actions) for t in together}) > 2  # some leave early
    for size in (1, 4, 8):
        assert [
            t.reasoning for t in evolve(policy, sample_rows=size).sample(PROMPTS, group_size=4, draw=Draw(3, 7))
        ] == [t.reasoning for t in together]


def test_bfloat16_is_replayed_within_its_rounding(folders):
    policy = planner(folders["llama"], dtype="bfloat16")
    assert policy.module.head.weight.dtype == torch.bfloat16
    stage, found = replayed(policy, policy.sample(PROMPTS, group_size=8, draw=Draw(0, 0)))
    gap = (found.log_probs - stage.log_probs)[stage.mask]
    assert gap.abs().mean() <= 0.02
    assert stage.log_probs.dtype == found.log_probs.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_replayed_as_they_were_sampled(folders, family):
    policy = planner(folders[family], lora_rank=2, dtype="bfloat16" if family == "llama" else "float32")
    found = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in found.items())
    assert len(found) == 2 * 2 * {"llama": 7, "gpt2": 4}[family]  # two halves, two blocks, every linear layer
    if family == "gpt2":
        moved(policy)
        assert_ratio_is_1(policy, policy.sample(PROMPTS, group_size=2, draw=Draw(0, 0)))


def moved(policy):
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return policy


def slopes(policy, trajectories):
    found = policy.replay(batched(policy, trajectories), {"reasoning": BOTH})["reasoning"]
    (found.log_probs.sum() + found.entropy.sum()).backward()
    return found.log_probs.detach(), {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_a_plain_forward_recomputed_or_not(folders, family):
    policy = planner(folders[family])
    drawn = policy.sample(PROMPTS[:2], group_size=1, draw=Draw(0, 0))
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    for one in drawn:
        segment = one.segments["reasoning"]
        prompt = segment.context["prompt_ids"]
        every = model(torch.cat([prompt, segment.actions])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        entropy = -(every.exp() * every).sum()
        (every.gather(1, segment.actions[:, None]).sum() + entropy).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    values, plain = slopes(policy, drawn)
    again, recomputed = slopes(planner(folders[family], gradient_checkpointing=True), drawn)
    assert torch.equal(values, again)
    for name, slope in expected.items():
        for found in (plain, recomputed):
            torch.testing.assert_close(found[f"model.{name}"], slope, atol=1e-4, rtol=1e-4)


def test_a_recomputing_planner_samples_what_another_does(folders):
    one, other = (planner(folders["gpt2"], gradient_checkpointing=on) for on in (False, True))
    first, second = (p.sample(PROMPTS, group_size=2, draw=Draw(0, 0)) for p in (one, other))
    assert [t.reasoning for t in first] == [t.reasoning for t in second]


def test_replay_with_nothing_trained_is_zeros_with_a_gradient_of_zero(folders):
    policy = planner(folders["llama"])
    drawn = policy.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))
    batch = collate([Row(t, {}, {}, frozenset()) for t in drawn], policy.stages)
    found = policy.replay(batch, {"reasoning": frozenset({"log_probs"})})["reasoning"]
    assert not found.log_probs.any()
    assert found.entropy is None


# ---- pictures ----


@pytest.mark.parametrize("family", VLMS)
def test_a_vlm_replays_what_it_drew_with_and_without_pictures(vlm_folders, family):
    policy = planner(vlm_folders[family], sees_image=True)
    for prompts in (SEEN, SEEN[2:], SEEN[:1]):  # a picture must not leave anything behind for rows without one
        assert_ratio_is_1(policy, policy.sample(prompts, group_size=2, draw=Draw(0, 0)))


def test_a_vlms_plans_do_not_depend_on_the_other_rows(vlm_folder):
    policy = planner(vlm_folder, sees_image=True)
    together = [t.reasoning for t in policy.sample(SEEN, group_size=2, draw=Draw(0, 0))]
    alone = [t.reasoning for p in SEEN for t in policy.sample([p], group_size=2, draw=Draw(0, 0))]
    assert together == alone


@pytest.mark.parametrize("family", VLMS)
def test_a_cold_vlm_says_what_transformers_own_generate_does(vlm_folders, family):
    vlm_folder = vlm_folders[family]
    policy = planner(vlm_folder, sees_image=True, temperature=1e-6)
    model = AutoModelForImageTextToText.from_pretrained(vlm_folder).eval()
    model.generation_config = GenerationConfig(eos_token_id=policy.ends[0], pad_token_id=0, do_sample=False)
    for drawn, prompt in zip(policy.sample(SEEN, group_size=1, draw=Draw(0, 0)), SEEN, strict=True):
        segment = drawn.segments["reasoning"]
        inputs = {
            name.removeprefix("model."): value if "pixel" in name or "grid" in name else value[None]
            for name, value in segment.context.items()
            if name.startswith("model.") and prompt.image is not None
        }
        ids = segment.context["prompt_ids"][None]
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **inputs)
        assert segment.actions.tolist() == said[0, ids.shape[1] :].tolist()


def test_the_picture_changes_the_plan_only_where_it_is_shown(vlm_folder):
    def plans(policy, shade):
        prompt = Prompt("a", "what is it?", image=picture(shade))
        return [t.reasoning for t in policy.sample([prompt], group_size=4, draw=Draw(0, 0))]

    seeing, blind = planner(vlm_folder, sees_image=True), planner(vlm_folder)
    assert plans(seeing, 0) != plans(seeing, 128)
    assert plans(blind, 0) == plans(blind, 128)


def test_a_vlms_eyes_do_not_learn(vlm_folder):
    for rank in (0, 2):
        policy = planner(vlm_folder, sees_image=True, lora_rank=rank)
        learns = {name for name, p in policy.module.named_parameters() if p.requires_grad}
        assert learns
        assert not any(".visual." in name for name in learns)


def test_a_saved_vlm_is_read_again_and_sees_the_same(vlm_folder, tmp_path):
    policy = moved(planner(vlm_folder, sees_image=True))
    policy.save(tmp_path / "saved")
    first, second = (
        p.sample(SEEN, group_size=1, draw=Draw(0, 0)) for p in (policy, planner(tmp_path / "saved", sees_image=True))
    )
    assert [t.reasoning for t in first] == [t.reasoning for t in second]


def test_a_picture_that_cannot_be_seen_is_refused_by_prompt_id(vlm_folder):
    with pytest.raises(DataError, match="picture of prompt thin") as error:
        planner(vlm_folder, sees_image=True).sample(
            [Prompt("thin", "a line", image=Image.new("RGB", (2000, 1)))], group_size=1, draw=Draw(0, 0)
        )
    assert "\n" not in str(error.value)


# ---- how a prompt is put ----


def text_of(policy, prompt=PROMPTS[0]):
    (drawn,) = policy.sample([prompt], group_size=1, draw=Draw(0, 0))
    return policy.tokenizer.decode(drawn.segments["reasoning"].context["prompt_ids"])


def test_without_a_chat_template_instruction_and_examples_stand_before_the_prompt(folders):
    policy = planner(folders["llama"], examples=[("a hat", "hat above")])
    assert text_of(policy) == "Plan it.\n\nCaption: a hat\nPlan:\nhat above\n\nCaption: a cup\nPlan:\n"
    assert policy.foretell(PROMPTS, group_size=2) == []


def test_a_template_is_all_that_is_put(folders):
    assert text_of(planner(folders["llama"], template="Lay out {prompt}:")) == "Lay out a cup:"


def test_a_chat_template_is_given_turns_and_the_user_says_what_the_system_may_not(folders, tmp_path):
    policy = planner(folders["llama"], examples=[("a hat", "hat above")])
    policy.tokenizer.chat_template = CHAT
    said = "[user]Plan it.\n\na hat<eos>[assistant]hat above<eos>[user]a cup<eos>[assistant]"
    assert text_of(policy) == said
    policy.tokenizer.chat_template = CHAT.replace("{{ raise_exception('no system') }}", "")
    assert text_of(evolve(policy, examples=())) == "[system]Plan it.<eos>[user]a cup<eos>[assistant]"
    policy.tokenizer.chat_template = "{{ messages[-1].content }}"
    assert policy.foretell(PROMPTS, group_size=2)[0].endswith(
        "leaves the instruction out: plans come as the model learned"
    )


def test_the_instruction_shows_the_form_that_plans_are_read_in():
    from reasonrl.plan import Plan

    assert [o.name for o in Plan.parse(INSTRUCTION).objects] == ["name"]


def test_control_tokens_in_a_prompt_are_refused_by_its_id(folders, vlm_folder):
    with pytest.raises(DataError, match=r"mine:3 \(contains the control token '<eos>'\)") as error:
        planner(folders["llama"]).check([*PROMPTS, Prompt("mine:3", "a cup<eos>[assistant] two")])
    assert "\n" not in str(error.value)
    for token in ("<|im_end|>", "<|image_pad|>"):
        with pytest.raises(DataError, match="control token"):
            planner(vlm_folder, sees_image=True).sample([Prompt("x", f"a {token} b")], group_size=1, draw=Draw(0, 0))


def test_prompts_that_the_model_has_no_words_or_no_room_for_are_refused_by_id(folders):
    with pytest.raises(DataError, match=r"s:1 \(unknown word 'teal', 'vase'\)"):
        Planner("nano").check([Prompt("s:1", "a teal vase")])
    with pytest.raises(DataError, match=r"a \(\d+ tokens and 600 for the plan, the context holds 512\)"):
        planner(folders["gpt2"], max_tokens=600).check(PROMPTS[:1])
    with pytest.raises(DataError, match=r"e \(no tokens are left of it\)"):
        planner(folders["llama"], template="{prompt}").check([Prompt("e", "")])


# ---- ends, demonstrations, checkpoints ----


def test_every_end_that_the_generation_config_names_ends_a_plan(folders, tmp_path):
    policy = planner(folders["llama"], max_tokens=60)
    drawn = policy.sample(PROMPTS, group_size=8, draw=Draw(0, 0))
    other = drawn[0].segments["reasoning"].actions[2].item()
    policy.save(tmp_path)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [other, 1]}))
    again = planner(tmp_path, max_tokens=60)
    assert again.ends == (1, other)
    for before, after in zip(drawn, again.sample(PROMPTS, group_size=8, draw=Draw(0, 0)), strict=True):
        one, two = before.segments["reasoning"].actions.tolist(), after.segments["reasoning"].actions.tolist()
        cut = next((k + 1 for k, token in enumerate(one) if token in (1, other)), len(one))
        assert two == one[:cut]
        assert after.stop is (Stop.END if two[-1] in (1, other) else Stop.LENGTH)


def test_a_plan_that_is_cut_is_trained_whole_and_says_so(folders):
    for drawn in planner(folders["llama"], max_tokens=3).sample(PROMPTS, group_size=4, draw=Draw(0, 0)):
        segment = drawn.segments["reasoning"]
        assert segment.mask.all()
        assert (drawn.stop is Stop.LENGTH) == (segment.actions[-1].item() != 1)
        assert len(segment.actions) == 3 or drawn.stop is Stop.END


def test_demonstrations_are_the_text_and_the_end(folders, vlm_folder):
    for policy, prompt in ((planner(folders["llama"]), PROMPTS[1]), (planner(vlm_folder, sees_image=True), SEEN[0])):
        (shown,) = policy.encode([Trajectory(prompt, texts={"reasoning": "a cup, left"})])
        segment = shown.segments["reasoning"]
        assert policy.tokenizer.decode(segment.actions[:-1]) == "a cup, left"
        assert segment.actions[-1] == policy.ends[0]
        assert segment.log_probs is None
        (drawn,) = policy.sample([prompt], group_size=1, draw=Draw(0, 0))
        assert torch.equal(segment.context["prompt_ids"], drawn.segments["reasoning"].context["prompt_ids"])
        _, found = replayed(policy, [shown])
        assert (found.log_probs < 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_adapters_are_saved_merged_for_transformers_and_apart_for_peft(folders, tmp_path, family):
    def logits(model):
        with torch.no_grad():
            return model(torch.tensor([[5, 9, 20, 31]])).logits

    policy = moved(planner(folders[family], lora_rank=2, lora_alpha=8.0))
    wanted = logits(policy.module.model)
    policy.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    assert (logits(base) - wanted).abs().max() > 1e-2
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), peft, planner(tmp_path).module.model):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    AutoTokenizer.from_pretrained(tmp_path)


def test_variants_share_the_weights(folders):
    policy = planner(folders["llama"])
    assert evolve(policy, temperature=0.5).module is policy.module


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_policys_promises_hold(folders, family):
    check_policy(planner(folders[family]))


def test_a_seeing_policys_promises_hold(vlm_folder):
    check_policy(planner(vlm_folder, sees_image=True), SEEN)


# ---- the nano checkpoint ----


def test_nano_plans_are_those_of_got_r1_without_guidance():
    policy, whole = Planner("nano"), GoTR1("nano", guidance=1.0)
    prompts = load_prompts("scenes/train")[:64]
    drawn = policy.sample(prompts, group_size=1, draw=Draw(0, 0))
    other = whole.sample(prompts[:16], group_size=1, draw=Draw(0, 0))
    for one, two in zip(drawn[:16], other, strict=True):
        mine, theirs = one.segments["reasoning"], two.segments["reasoning"]
        assert torch.equal(mine.context["prompt_ids"], theirs.context["prompt_ids"])
    same = sum(a.reasoning == b.reasoning for a, b in zip(drawn[:16], other, strict=True))
    assert same >= 15  # a cut may fall between two sums
    planned = [t for t in drawn if t.plan.ok and all(o.box for o in t.plan.objects)]
    assert len(planned) >= 0.9 * len(drawn)  # 63 of 64 where this was written
    with torch.no_grad():
        for row in drawn[:8]:
            segment = row.segments["reasoning"]
            ids = torch.cat([segment.context["prompt_ids"], segment.actions])[None]
            mine, theirs = (p.module.model(input_ids=ids).logits.log_softmax(-1) for p in (policy, whole))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_saved_nano_plans_the_same_with_transformers_alone(tmp_path):
    policy = Planner("nano", temperature=1e-6)
    policy.save(tmp_path)
    again = evolve(policy, checkpoint=str(tmp_path))
    prompts = load_prompts("scenes/test")[:4]
    drawn, other = (p.sample(prompts, group_size=1, draw=Draw(0, 0)) for p in (policy, again))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert policy.ends == again.ends
    for prompt, one, two in zip(prompts, drawn, other, strict=True):
        assert one.reasoning == two.reasoning
        turns = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=400)
        assert said[0, ids.shape[1] :].tolist() == one.segments["reasoning"].actions.tolist()


def test_a_published_janus_is_asked_in_the_authors_words(folder):
    planned, whole = (kind(str(folder), max_tokens=5) for kind in (Planner, GoTR1))
    for prompt in PROMPTS:
        asked = planned._context(prompt)["prompt_ids"]
        assert asked.tolist() == whole._prompt_ids(prompt.text).tolist()
    assert planned.ends == (planned.tokenizer.convert_tokens_to_ids("<begin_of_image>"), 1)


def test_a_planner_trains_alone_and_resumes_to_the_same_bits(prompts_file, tmp_path):
    def recipe(steps):
        return Recipe(
            policy=Planner("nano", max_tokens=40),
            judge=SceneSemantic(),
            objective=GRPO(kl=0.05),
            prompts=str(prompts_file),
            prompts_per_step=2,
            group_size=4,
            steps=steps,
            learning_rate=1e-3,
        )

    def learned(built):
        return {n: p.detach().clone() for n, p in built.policy.module.named_parameters() if p.requires_grad}

    whole = recipe(2)
    start = learned(whole)
    run(whole, tmp_path / "whole", quiet=True)
    assert any(not torch.equal(start[name], value) for name, value in learned(whole).items())
    assert Planner(str(tmp_path / "whole" / "model")).sample(
        load_prompts("scenes/test")[:1], group_size=1, draw=Draw(0, 0)
    )
    run(recipe(1), tmp_path / "parts", quiet=True)
    rest = recipe(2)
    run(rest, tmp_path / "parts", resume=True, quiet=True)
    for name, value in learned(whole).items():
        assert torch.equal(value, learned(rest)[name]), name


def test_a_planner_learns_a_demonstration(folders):
    from reasonrl.loop import train

    policy = planner(folders["llama"])
    lessons = policy.encode([Trajectory(p, texts={"reasoning": "a cup"}) for p in PROMPTS])
    recipe = Recipe(policy=policy, objective=Supervised(), prompts=PROMPTS, steps=8, learning_rate=1e-2)
    before = replayed(policy, lessons)[1].log_probs.sum()

    def experience(weights):
        from reasonrl.types import Verdict

        for step in range(recipe.steps):
            yield step, lessons, [Verdict({}) for _ in lessons]

    train(recipe, experience)
    assert replayed(policy, lessons)[1].log_probs.sum() > before + 10


# ---- what is refused ----


def refusal(kind, build):
    with pytest.raises(kind) as error:
        build()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_that_cannot_work_are_refused():
    assert "{prompt} once" in refusal(ConfigError, lambda: Planner(template="draw it"))
    assert "leave out template" in refusal(ConfigError, lambda: Planner(template="{prompt}", sees_image=True))
    with pytest.raises(ValueError, match="temperature"):
        Planner(temperature=0.0)


def test_models_that_cannot_plan_are_refused_in_one_line(folders, tmp_path):
    def other(name, model):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return refusal((ConfigError, CheckpointError), lambda: Planner(str(tmp_path / name)).module)

    small = {"vocab_size": 100, **SIZE}
    t5 = T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    assert "is an encoder-decoder (t5)" in other("t5", T5ForConditionalGeneration(t5))
    headless = other("headless", LlamaModel(LlamaConfig(**small)))
    assert "lacks 1 weights of LlamaForCausalLM (first: lm_head.weight)" in headless
    assert "it attends to what comes later" in other("bert", BertLMHeadModel(BertConfig(**small)))
    assert "text alone (llama): give a VLM" in refusal(
        ConfigError, lambda: planner(folders["llama"], sees_image=True).module
    )
    assert "of which the language part is read" in refusal(ConfigError, lambda: Planner(sees_image=True).module)
    assert "no checkpoint at" in refusal(CheckpointError, lambda: Planner(str(tmp_path / "nowhere")).module)


def test_broken_folders_are_refused_in_one_line(folders, tmp_path):
    def changed(name, change):
        planner(folders["llama"]).save(tmp_path / name)
        change(tmp_path / name)
        return refusal((ConfigError, CheckpointError), lambda: Planner(str(tmp_path / name)).module)

    def endless(folder):
        said = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "eos_token"}))

    def cut(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])

    assert "has no end of text: set its eos_token" in changed("endless", endless)
    assert "cannot be loaded as a language model" in changed("cut", cut)
    assert "holds no weights" in changed("empty", lambda folder: (folder / "model.safetensors").unlink())
    assert "they are of two checkpoints" in changed("foreign", lambda folder: write_tokenizer(folder, size=200))


def test_pictures_that_make_no_batch_are_refused_in_one_line():
    prompts = [
        {"prompt_ids": torch.ones(3, dtype=torch.long), "model.pixel_values": torch.zeros(1, tiles, 3, 4, 4)}
        for tiles in (3, 5)
    ]
    with pytest.raises(DataError, match=r"pictures become pixel_values of \(3, 3, 4, 4\) and \(5, 3, 4, 4\)"):
        rectangle(prompts, pad=0, device=torch.device("cpu"))


def test_variants_with_other_adapters_leave_the_trained_weights_where_they_are():
    policy = Planner("nano")
    before = policy.module
    assert evolve(policy, lora_rank=2).module is not before
    assert policy.module is before
