"""The sampler against slow twins: dense attention, transformers' forward, and itself without its short cuts."""

import itertools

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import reasonrl as rl
from reasonrl import CheckpointError, ConfigError, ContractError, Draw, Prompt
from reasonrl.batch import passes
from reasonrl.judges import DualStage, ScenePromptImage
from reasonrl.noise import uniform
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1, janus_sampler, stepper
from reasonrl.policies.cascade_cache import Cascade
from reasonrl.policies.janus_sampler import Sampler
from reasonrl.policies.llama_decoder import Decoder
from reasonrl.renderers import Tokens

PROMPTS = [
    Prompt("a", "a circle"),
    Prompt("b", "a striped red circle on the left of a blue square"),
    Prompt("c", "three green crosses and one yellow diamond"),
]
NOISE = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def policy():
    return GoTR1("nano", guidance=5.0, max_tokens=40)


def sampler_of(policy, **fields):
    return Sampler(policy.module, policy.special, guidance=policy.guidance, temperature=policy.temperature, **fields)


def rows_of(policy, trajectory):
    reasoning = trajectory.segments["reasoning"]
    return torch.cat([reasoning.context["prompt_ids"], reasoning.actions])


# ---- the cache ----


@st.composite
def shared_rows(draw):
    """(prefixes, rows a prefix, kv heads, groups, prefix length, steps), and how much each row sees."""
    prefixes, rows, length, steps = (draw(st.integers(1, most)) for most in (3, 3, 5, 6))
    seen = [draw(st.integers(1, length)) for _ in range(prefixes * rows)]
    return prefixes, rows, draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), length, steps, seen


@settings(max_examples=60, deadline=None)
@given(shared_rows(), st.integers(0, 2**31))
def test_attention_over_shared_prefixes_is_attention_over_each_row_whole(case, seed):
    num_prefixes, rows, kv_heads, groups, length, steps, seen = case
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    prefix = normal(2, num_prefixes, kv_heads, length, 4)
    visible = torch.arange(length) < torch.tensor(seen)[:, None]
    cache = Cascade([(prefix[0], prefix[1])], visible.view(num_prefixes, rows, length), capacity=1)
    num_rows = num_prefixes * rows
    whole = [prefix[:, row // rows, :, : seen[row]] for row in range(num_rows)]  # (2, kv heads, L, D)
    for step in range(steps):
        if step == cache.capacity:
            cache.grow(2 * step)
        assert cache.positions.tolist() == [n + step for n in seen]
        query, key, value = normal(num_rows, kv_heads * groups, 4), *normal(2, num_rows, kv_heads, 4)
        span = min(step + 1, cache.capacity)
        found = cache.attend(0, query, key, value, hidden=cache.hidden(span), span=span, scale=0.5)
        cache.advance()
        for row in range(num_rows):
            whole[row] = torch.cat([whole[row], torch.stack([key[row], value[row]])[:, :, None]], 2)
            keys, values = (part.repeat_interleave(groups, 0) for part in whole[row])
            wanted = F.scaled_dot_product_attention(query[row][:, None], keys, values, scale=0.5)
            torch.testing.assert_close(found[row], wanted[:, 0], atol=1e-12, rtol=1e-9)


def test_a_wider_span_than_needed_hides_what_is_not_there():
    """As on a GPU, where one captured graph serves a stride of steps."""
    prefix = torch.randn(2, 1, 2, 3, 4, generator=NOISE)
    query, key, value = (torch.randn(2, 2, 4, generator=NOISE) for _ in range(3))
    found = []
    for span in (1, 5):
        cache = Cascade([(prefix[0], prefix[1])], torch.ones(1, 2, 3, dtype=torch.bool), capacity=8)
        cache.all_even = False
        found.append(cache.attend(0, query, key, value, hidden=cache.hidden(span), span=span, scale=0.5))
    torch.testing.assert_close(found[0], found[1])


# ---- one token a row ----


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 4])
def test_single_steps_are_transformers_forward(rank):
    policy = GoTR1("nano", lora_rank=rank)
    language = policy.module.model.model.language_model
    decoder = Decoder(language)
    prompts = [torch.tensor([2, 20, 30, 4]), torch.tensor([2, 9, 8, 7, 6, 5, 4])]
    tokens, lengths = janus_sampler._padded(prompts, policy.special.pad, torch.device("cpu"))
    _, prefix = decoder.prefill(tokens)
    seen = (torch.arange(7) < lengths[:, None])[:, None].expand(-1, 3, -1)
    cache = Cascade(prefix, seen, capacity=5)
    words = torch.randint(5, 60, (6, 5), generator=torch.Generator().manual_seed(1))
    for step in range(5):
        state = decoder.step(policy.module.model.get_input_embeddings()(words[:, step]), [cache], spans=[step + 1])
        for row in range(6):
            ids = torch.cat([prompts[row // 3], words[row, : step + 1]])[None]
            wanted = language(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(state[row], wanted, atol=2e-5, rtol=1e-5)


def test_a_language_model_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match=r"decodes Llama models, as in Janus.*Linear"):
        Decoder(torch.nn.Linear(2, 2))


# ---- drawing ----


def same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.member == other.member
        for name, segment in one.segments.items():
            assert torch.equal(segment.actions, other.segments[name].actions)
            torch.testing.assert_close(segment.log_probs, other.segments[name].log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_that_leave_early_or_never_draw_the_same(policy, monkeypatch, share):
    usual = policy.sample(PROMPTS, group_size=4, draw=Draw(0, 0))
    assert len({len(t.segments["reasoning"].actions) for t in usual}) > 3
    monkeypatch.setattr(janus_sampler, "LEAVE", share)
    same(usual, policy.sample(PROMPTS, group_size=4, draw=Draw(0, 0)))


def test_finished_rows_are_not_computed(policy, monkeypatch):
    taken = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, embedded, *a, **k: taken.append(len(embedded)) or step(self, embedded, *a, **k)
    )
    drawn = policy.sample(PROMPTS, group_size=8, draw=Draw(0, 0))
    longest = max(len(t.segments["reasoning"].actions) for t in drawn)
    written = sum(len(t.segments["reasoning"].actions) for t in drawn)
    reasoning = taken[:longest]
    assert reasoning[0] == 24
    assert reasoning[-1] < 24
    assert written <= sum(reasoning) < 0.9 * 24 * longest


def test_a_cache_that_grows_draws_the_same(policy, monkeypatch):
    usual = policy.sample(PROMPTS, group_size=2, draw=Draw(0, 0))
    monkeypatch.setattr(janus_sampler, "FIRST_ROOM", 3)
    same(usual, policy.sample(PROMPTS, group_size=2, draw=Draw(0, 0)))


def test_looks_between_strides_draw_the_same(policy, monkeypatch):
    """As on a GPU: spans of a stride, and finished rows that go on a while because nobody has looked."""
    usual = policy.sample(PROMPTS, group_size=3, draw=Draw(0, 0))

    def strides(self, before):
        self.step((before // 16 + 1) * 16)

    monkeypatch.setattr(stepper.Stepper, "__call__", strides)
    release, calls = janus_sampler._Writing._release, itertools.count(1)

    def seldom(self):
        if next(calls) % 7 == 0 or int(self.time) == self.most or not self.writing.any():
            release(self)

    monkeypatch.setattr(janus_sampler._Writing, "_release", seldom)
    monkeypatch.setattr(Cascade, "hidden", whole_mask)
    same(usual, policy.sample(PROMPTS, group_size=3, draw=Draw(0, 0)))


def whole_mask(self, span):
    later = torch.arange(span) > self.used[:, None]
    return torch.cat([~self.seen, later.view(*self.seen.shape[:2], span)], 2)


def test_chunks_change_nothing_but_float_error(policy):
    same(
        policy.sample(PROMPTS, group_size=2, draw=Draw(0, 0)),
        evolve(policy, sample_rows=2).sample(PROMPTS, group_size=2, draw=Draw(0, 0)),
    )


# ---- several images of one plan ----


def test_images_of_a_plan_share_it_and_differ(policy):
    drawn = evolve(policy, images_per_plan=3).sample(PROMPTS, group_size=6, draw=Draw(0, 0))
    members = [(g, k) for g in range(2) for k in range(3)] * 3
    assert [t.member for t in drawn] == members
    for trajectory, twin in itertools.pairwise(drawn):
        plans = [t.segments["reasoning"] for t in (trajectory, twin)]
        images = [t.segments["image"] for t in (trajectory, twin)]
        shares = trajectory.prompt.id == twin.prompt.id and trajectory.member[0] == twin.member[0]
        assert (plans[0] is plans[1]) == shares
        assert images[1].member == twin.member
        assert not torch.equal(images[0].actions, images[1].actions)
        assert plans[1].member == twin.member[:1]


def test_images_of_a_plan_are_those_of_its_tokens_alone(policy):
    variant = evolve(policy, images_per_plan=2)
    drawn = variant.sample(PROMPTS, group_size=4, draw=Draw(0, 0))
    prefixes = [rows_of(policy, t) for t in drawn[::2]]
    keys = [Draw(0, 0).key(t.prompt.id, t.member, "image") for t in drawn]
    alone = sampler_of(policy).images(prefixes, 2, uniform(keys, policy.num_image_tokens))
    for row, trajectory in enumerate(drawn):
        image = trajectory.segments["image"]
        assert torch.equal(image.actions, alone.ids[row])
        torch.testing.assert_close(image.log_probs, alone.log_probs[row], atol=1e-4, rtol=0)


def test_groups_that_are_no_whole_number_of_plans_are_refused(policy):
    with pytest.raises(ConfigError, match=r"group_size must be a multiple of images_per_plan=3, got 4"):
        evolve(policy, images_per_plan=3).sample(PROMPTS, group_size=4, draw=Draw(0, 0))


def test_a_group_of_one_is_a_plan_with_an_image_as_in_evaluation(policy):
    (one,) = evolve(policy, images_per_plan=3).sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))
    (plain,) = policy.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))
    same([one], [plain])


def test_a_run_with_several_images_a_plan_evaluates_and_trains_each_plan_once(tmp_path):
    recipe = rl.Recipe(
        policy=GoTR1("nano", guidance=2.0, max_tokens=40, images_per_plan=2),
        renderer=Tokens(),
        judge=DualStage("arxiv-v1"),
        objective=GRPO(),
        prompts=PROMPTS,
        group_size=4,
        prompts_per_step=2,
        steps=1,
        tests={"test": "scenes/test"},
        test_judge=ScenePromptImage(),
    )
    rows = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reasonrl.recipe.load_prompts", lambda source: PROMPTS)
        patched.setattr("reasonrl.session.load_prompts", lambda source: PROMPTS)
        patched.setattr("reasonrl.loop.passes", lambda update, *a, **k: rows.extend(update) or passes(update, *a, **k))
        rl.run(recipe, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "report.html").is_file()
    trained = [row.trajectory.segments["reasoning"] for row in rows if "reasoning" in row.trained]
    assert len(rows) == 8
    assert len(trained) == len({id(segment) for segment in trained}) == 4


def test_a_run_that_cannot_draw_leaves_no_folder_behind(tmp_path):
    recipe = rl.Recipe(
        policy=GoTR1("nano", images_per_plan=3), renderer=Tokens(), judge=DualStage(), objective=GRPO(), group_size=4
    )
    with pytest.raises(ConfigError, match="images_per_plan=3, got 4"):
        rl.run(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_only_a_plan_that_ran_out_of_tokens_was_cut(policy):
    (drawn,) = policy.sample(PROMPTS[:1], group_size=1, draw=Draw(0, 0))
    segment = drawn.segments["reasoning"]
    special = policy.special
    last = {"drawn": [9, special.begin_image], "said": [special.end_text, special.begin_image]}
    last["cut"] = [9, special.begin_image]
    forced = {"drawn": [True, True], "said": [True, False], "cut": [True, False]}
    ended = {
        name: policy._ended(
            evolve(segment, actions=torch.tensor(ids), mask=torch.tensor(forced[name]), log_probs=None, context={})
        )
        for name, ids in last.items()
    }
    assert ended == {"drawn": True, "said": True, "cut": False}


def test_a_prefix_that_does_not_begin_a_text_is_refused(policy):
    with pytest.raises(ContractError, match="must begin with token"):
        sampler_of(policy).images([torch.tensor([9, 9, 9])], 1, uniform([1], 64))


# ---- memory ----


def plan_with(monkeypatch, free, **fields):
    monkeypatch.setattr("reasonrl.policies.sampling_plan.free_bytes", lambda device: free)
    policy = GoTR1("nano", guidance=5.0, **fields)
    return policy.foretell(PROMPTS, group_size=16)


def test_the_plan_follows_free_memory_in_powers_of_two(monkeypatch):
    assert plan_with(monkeypatch, 10**11)[0].startswith("draws 256 trajectories at once: at most ")
    (some,) = plan_with(monkeypatch, 10**9)
    assert some == plan_with(monkeypatch, 1.02 * 10**9)[0].replace("1.02 GB free", "1 GB free")
    assert some.startswith("draws 64 trajectories at once")
    assert plan_with(monkeypatch, 10**9, max_tokens=60)[0].startswith("draws 256 ")
    assert plan_with(monkeypatch, 1, sample_rows=32) == []


def test_too_little_memory_for_one_group_is_one_line_with_the_way_out(monkeypatch):
    with pytest.raises(ConfigError, match=r"to draw one group of 16 takes .* lower max_tokens or group_size") as error:
        plan_with(monkeypatch, 5 * 10**7)
    assert "\n" not in str(error.value)
    assert "50 MB are free on cpu" in str(error.value)


def test_longer_prompts_have_a_plan_of_their_own(monkeypatch):
    monkeypatch.setattr("reasonrl.policies.sampling_plan.free_bytes", lambda device: 10**9)
    policy = GoTR1("nano", guidance=5.0)
    short = policy.foretell(PROMPTS, group_size=16)
    assert policy.foretell([Prompt("long", "a circle " * 200)], group_size=16) != short
    assert policy.foretell(PROMPTS, group_size=16) == short


def test_the_plan_is_made_once_so_that_a_run_draws_in_even_batches(monkeypatch):
    free = iter([10**9, 10**11])
    monkeypatch.setattr("reasonrl.policies.sampling_plan.free_bytes", lambda device: next(free))
    policy = GoTR1("nano", guidance=5.0)
    assert policy.foretell(PROMPTS, group_size=16) == policy.foretell(PROMPTS, group_size=16)
