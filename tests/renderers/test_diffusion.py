from __future__ import annotations

import pickle

import pytest
import torch
from attrs import evolve
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from tests.renderers import toy_family
from tests.renderers.toy_family import Loaded, Plans, Toy, ToyVariancePreserving, given

from reasonrl import ConfigError, Draw, PointwiseJudge, Prompt, Recipe, Score, Trajectory, train
from reasonrl.batch import Row, _bare, collate, passes
from reasonrl.credit import credit
from reasonrl.objectives import GRPO, AdvantageWeighted, DenoisingGRPO, DiffusionDPO, DiffusionNFT
from reasonrl.renderers import Diffusion
from reasonrl.renderers.denoising import Guidance, velocity
from reasonrl.renderers.steps import CPS, DDIM, ODE, DanceSDE, FlowSDE
from reasonrl.rollout import Guarded, rollouts
from reasonrl.testing import PLAN, check_renderer
from reasonrl.types import Stop

DRAW = Draw(0, 0)
LIKELIHOODS = frozenset({"log_probs", "entropy"})


def renderer(family=Toy, **settings) -> Diffusion:
    return Diffusion(loader=Loaded(family()), num_steps=4, **settings)


def batch_of(drawn, stage="image"):
    return collate([Row(t, {stage: 1.0}, {stage: 0}, frozenset({stage})) for t in drawn], (stage,))


def gap(drawn, model) -> float:
    """Returns the largest difference of the replayed log-probs from those that were recorded."""
    batch = batch_of(drawn)
    found = model.replay(batch, {"image": LIKELIHOODS})["image"]
    return float((found.log_probs.detach() - batch.stages["image"].log_probs).abs().max())


class Brightness(PointwiseJudge):
    """The mean of the picture's pixels, in [0, 1]."""

    needs = frozenset({"image"})

    def score(self, trajectory):
        return sum(trajectory.image.convert("L").tobytes()) / 255 / 64


# ---- Sampling and replay are one distribution ----


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", [FlowSDE(), FlowSDE(s_max=0.9), DanceSDE(), CPS(), DDIM(), DDIM(eta=0.5)])
def test_ratio_is_one_before_the_first_update_for_every_kernel_and_storage(kernel, storage):
    model = renderer(ToyVariancePreserving if isinstance(kernel, DDIM) else Toy, kernel=kernel, storage=storage)
    assert gap(model.render(given(), draw=DRAW), model) < 1e-5


@given_by(
    guidance=st.sampled_from([0.5, 1.0, 3.0]),
    window=st.sampled_from([("all", None), ("early", 2), ("random", 1), ("sliding", 2)]),
    start=st.sampled_from(["own", "shared", "branched"]),
    rows=st.sampled_from([1, 3, 32]),
    reduce=st.sampled_from(["mean", "sum"]),
    unconditional=st.sampled_from(["trained", "detached"]),
    step=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_ratio_is_one_under_guidance_windows_and_branches(guidance, window, start, rows, reduce, unconditional, step):
    model = renderer(
        guidance=guidance,
        window=window[0],
        window_size=window[1],
        start=start,
        sample_rows=rows,
        reduce=reduce,
        unconditional=unconditional,
    )
    drawn = model.render(given(), draw=Draw(0, step))
    assert gap(drawn, model) < (1e-5 if reduce == "mean" else 1e-3)
    assert all(len(t.segments["image"].actions) == (window[1] or 4) for t in drawn)


def test_the_recorded_steps_are_the_kernels_own_numbers():
    model = renderer(record_means=True)
    (first, *_) = model.render(given(), draw=DRAW)
    segment = first.segments["image"]
    s, s_next, inputs = segment.context["schedule"][0].tolist()
    x = segment.context["start"][None]
    with torch.no_grad():
        v = model.family.predict(x, torch.tensor([inputs]).float(), {"words": segment.context["full/words"][None]})
    mean, std = FlowSDE().moments(x, v, s, s_next)
    torch.testing.assert_close(segment.context["means"][0], mean[0])
    z = (segment.actions[0] - mean[0]) / std
    expected = torch.distributions.Normal(mean[0], std).log_prob(segment.actions[0]).mean()
    torch.testing.assert_close(segment.log_probs[0], expected)
    assert abs(float(z.mean())) < 1
    torch.testing.assert_close(segment.actions[-1], segment.context["clean"])


def test_the_entropy_is_that_of_the_steps_normals():
    for reduce in ("mean", "sum"):
        model = renderer(reduce=reduce)
        batch = batch_of(model.render(given(), draw=DRAW))
        found = model.replay(batch, {"image": LIKELIHOODS | {"std"}})["image"]
        expected = torch.distributions.Normal(0.0, found.extras["std"]).entropy() * (32 if reduce == "sum" else 1)
        torch.testing.assert_close(found.entropy, expected)


def test_replay_returns_only_what_is_asked_and_zeros_outside_the_mask():
    model = renderer(record_means=True)
    batch = batch_of(model.render(given(), draw=DRAW))
    stage = batch.stages["image"]
    narrow = evolve(stage, mask=stage.mask & (torch.arange(4) == 2))
    found = model.replay(evolve(batch, stages={"image": narrow}), {"image": frozenset({"mean", "step_size"})})["image"]
    assert found.log_probs is None
    assert set(found.extras) == {"mean", "step_size"}
    assert not found.extras["mean"][:, [0, 1, 3]].any()
    whole = model.replay(batch, {"image": frozenset({"mean", "drawn_mean"})})["image"]
    torch.testing.assert_close(found.extras["mean"][:, 2], whole.extras["mean"][:, 2])
    torch.testing.assert_close(whole.extras["mean"], whole.extras["drawn_mean"])


def test_a_detached_unconditional_branch_gives_the_gradient_of_the_full_one_alone():
    gradients = {}
    for unconditional in ("trained", "detached"):
        model = renderer(guidance=3.0, unconditional=unconditional, window="early", window_size=1)
        batch = batch_of(model.render(given(), draw=DRAW))
        model.replay(batch, {"image": LIKELIHOODS})["image"].log_probs.sum().backward()
        gradients[unconditional] = model.module.outer.bias.grad.clone()
    # The bias adds to both branches: v moves by 3 − 2 = 1 with both, by 3 with the full one alone.
    torch.testing.assert_close(gradients["detached"], 3 * gradients["trained"], rtol=1e-4, atol=1e-6)


def test_one_step_a_pass_gives_the_same_gradient_and_predicts_one_step_at_a_time():
    model = renderer()
    rows = [Row(t, {"image": 1.0}, {"image": 0}, frozenset({"image"})) for t in model.render(given(), draw=DRAW)]
    gradients = []
    for num_actions in (None, 1):
        model.module.zero_grad()
        model.module.rows_at_once.clear()
        for _, batch in passes(rows, model, num_rows=None, num_actions=num_actions, whole_groups=False):
            model.replay(batch, {"image": LIKELIHOODS})["image"].log_probs.sum().backward()
        gradients.append(model.module.inner.weight.grad.clone())
        assert model.module.rows_at_once == ([16] if num_actions is None else [4] * 4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


# ---- Noise has addresses ----


def test_other_rows_and_chunks_do_not_move_a_picture():
    model = renderer(sample_rows=32)
    together = model.render(given(), draw=DRAW)
    turned = evolve(model, sample_rows=1).render(list(reversed(given())), draw=DRAW)[::-1]
    for one, other in zip(together, turned, strict=True):
        torch.testing.assert_close(one.segments["image"].actions, other.segments["image"].actions)
    assert len({t.segments["image"].actions[-1].sum().item() for t in together}) == 4


def test_images_of_a_plan_have_addresses_below_it_and_follow_each_other():
    drawn = renderer(images_per_plan=3).render(given(), draw=DRAW)
    assert [t.member for t in drawn[:6]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [t.segments["image"].member for t in drawn] == [t.member for t in drawn]
    alone = renderer(images_per_plan=3).render(given(members=1), draw=DRAW)
    assert [t.member for t in alone] == [(0,), (0,)]


def test_a_branched_group_shares_its_first_steps_and_pays_for_them_once():
    model = renderer(start="branched", window="sliding", window_size=1)
    drawn = model.render(given(members=4), draw=Draw(0, 2))  # the window is the third step
    starts = torch.stack([t.segments["image"].context["start"] for t in drawn])
    assert starts[:4].unique(dim=0).shape[0] == 1
    assert not torch.equal(starts[0], starts[4])
    assert torch.stack([t.segments["image"].actions for t in drawn]).unique(dim=0).shape[0] == 8
    assert model.module.rows_at_once == [2, 2, 8, 8]


def test_pictures_of_different_plans_share_noise_but_no_steps():
    other = PLAN.replace("red", "green")
    model = renderer(start="branched", window="sliding", window_size=1)
    drawn = model.render(given(PLAN, other, members=2), draw=Draw(0, 2))
    starts = torch.stack([t.segments["image"].context["start"] for t in drawn])
    assert starts.unique(dim=0).shape[0] == 4
    assert model.module.rows_at_once[0] == 4


def test_steps_outside_the_window_follow_the_ode():
    model = renderer(window="early", window_size=1)
    (first, *_) = model.render(given(), draw=DRAW)
    segment, family = first.segments["image"], model.family
    times, x = family.schedule(4, family.size).times.float(), segment.actions[0]
    with torch.no_grad():
        for i in range(1, 4):
            v = family.predict(x[None], times[i][None], {"words": segment.context["full/words"][None]})[0]
            x = x + (times[i + 1] - times[i]) * v
    torch.testing.assert_close(x, segment.context["clean"])


# ---- What is drawn ----


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("prompt", "a dog"),
        ("plan", "red cup is left of blue plate."),
        ("both", "a dog red cup is left of blue plate."),
    ],
)
def test_the_pipeline_reads_prompt_prose_or_both_without_marks_and_coordinates(text, read):
    (first, *_) = renderer(text=text).render(given(), draw=DRAW)
    assert torch.equal(first.segments["image"].context["full/words"], toy_family.words(read))


@pytest.mark.parametrize("broken", ["", "no boxes here", "<|obj_start|>red cup<|obj_end|> <|box_start|>(1,2"])
def test_a_plan_without_boxes_is_drawn_from_the_prompt_or_not_at_all_as_the_field_says(broken):
    rows = given(broken, PLAN)
    by_prompt = renderer(without_plan="prompt").render(rows, draw=DRAW)
    assert torch.equal(by_prompt[0].segments["image"].context["full/words"], toy_family.words("a dog"))
    nothing = renderer(without_plan="nothing").render(rows, draw=DRAW)
    assert [t.image is None for t in nothing] == [True, False] * 2
    assert Guarded(Brightness(), 10).judge(nothing)[0].total("image") == 0.0
    unscored = renderer(without_plan="unscored").render(rows, draw=DRAW)
    verdict = Guarded(Brightness(), 10).judge(unscored)[0]
    assert verdict.total("image") is None
    assert verdict.scores["judge"].note == "not drawn: a plan without boxes"


def test_an_image_to_edit_reaches_the_adapter():
    from PIL import Image

    seen = []

    class Edits(Toy):
        def encode(self, briefs, size):
            seen.extend(brief.image for brief in briefs if brief.text)
            return super().encode(briefs, size)

    picture = Image.new("RGB", (8, 8))
    row = Trajectory(Prompt("a", "make it blue", image=picture), (0,), texts={"reasoning": PLAN})
    renderer(Edits).render([row], draw=DRAW)
    assert seen == [picture]


def test_equal_briefs_are_encoded_once():
    seen = []

    class Counts(Toy):
        def encode(self, briefs, size):
            seen.append(len(briefs))
            return super().encode(briefs, size)

    renderer(Counts, guidance=2.0).render(given(members=8), draw=DRAW)
    assert seen == [2, 1]


# ---- Faults ----


def test_a_latent_that_is_not_finite_is_unscored_and_trains_nothing():
    rows = [evolve(t, texts={"reasoning": PLAN}) for t in given(prompts=("a dog", "poison"), members=2)]
    rows[1] = evolve(rows[1], prompt=Prompt("a dog", "poison of one member"))
    model = renderer(text="prompt")
    drawn = model.render(rows, draw=DRAW)
    assert [t.stop for t in drawn] == [Stop.END, Stop.FAULT, Stop.FAULT, Stop.FAULT]
    assert [t.image is None for t in drawn] == [False, True, True, True]
    verdicts = Guarded(Brightness(), 10).judge(drawn)
    assert verdicts[1].scores["judge"] == Score(None, "not drawn: latents are not finite")
    recipe = Recipe(Plans(), Brightness(), renderer=model, objectives={"image": GRPO()}, group_size=2)
    batch = collate(credit(drawn, verdicts, recipe, gather=list), ("image",))
    assert batch.stages["image"].mask.any(1).tolist() == [False] * 4  # a group with one scored member has no baseline
    assert torch.isfinite(batch.stages["image"].actions).all()


def test_kernels_of_the_other_kind_of_model_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"is a rectified flow, and DDIM.* use FlowSDE"):
        renderer(kernel=DDIM()).render(given(), draw=DRAW)
    with pytest.raises(ConfigError, match=r"is variance-preserving, and FlowSDE.* use DDIM"):
        renderer(ToyVariancePreserving, kernel=FlowSDE()).render(given(), draw=DRAW)


def test_windows_and_their_sizes_must_agree():
    with pytest.raises(ConfigError, match="window='random' needs window_size"):
        Diffusion(window="random")
    with pytest.raises(ConfigError, match="window='all' has no window_size, got 2"):
        Diffusion(window_size=2)
    with pytest.raises(ConfigError, match="window_size <= window_within <= num_steps must hold, got 20, None, 10"):
        Diffusion(window="early", window_size=20, num_steps=10)
    with pytest.raises(
        ConfigError, match=r"CPS.* has no density at some of the steps to train, only at the first 3 of"
    ):
        renderer(kernel=CPS(), window_within=4).render(given(), draw=DRAW)
    with pytest.raises(ConfigError, match="leaves nothing to learn at guidance=0"):
        Diffusion(guidance=0.0, unconditional="detached")


def test_what_cannot_be_drawn_is_refused_when_weights_are_loaded():
    with pytest.raises(ConfigError, match="use FlowSDE"):
        _ = renderer(kernel=DDIM()).module
    with pytest.raises(ConfigError, match="64x64"):
        _ = Diffusion("nano", size=(32, 32)).module


def test_the_shipped_renderer_keeps_every_promise_of_its_interface():
    check_renderer(Diffusion("nano", num_steps=2, images_per_plan=2))


def test_a_row_that_is_sent_carries_no_more_than_itself():
    model = renderer(record_means=True)
    rows = [
        Row(t, {"image": 1.0}, {"image": 0}, frozenset({"image"})) for t in model.render(given(members=16), draw=DRAW)
    ]
    alone = pickle.dumps(_bare(rows[:1]))
    assert len(alone) < 20_000
    assert len(pickle.dumps(rows[:1])) > 2 * len(alone)


def test_means_are_kept_only_where_they_are_asked_for():
    path = renderer()._path(DRAW)
    noise = (torch.randn(2, *toy_family.SHAPE) for _ in range(4))
    with torch.no_grad():
        taken = path.random(
            torch.randn(2, *toy_family.SHAPE), {"full": {"words": torch.zeros(2, 4)}}, noise, keep_means=False
        )
    assert [one.mean.numel() for one in taken] == [0] * 4


def test_a_renderer_without_random_steps_draws_no_stage_and_cannot_be_trained():
    model = renderer(window="none")
    drawn = model.render(given(), draw=DRAW)
    assert all(t.image is not None and not t.segments for t in drawn)
    assert model.stages == ()
    with pytest.raises(ConfigError, match="stage 'image', which nobody draws"):
        Recipe(Plans(), Brightness(), renderer=model, objectives={"image": GRPO()}, group_size=2)


def test_likelihoods_are_not_offered_by_the_ode():
    with pytest.raises(ConfigError, match=r"GRPO needs \['entropy', 'log_probs'\] of stage 'image'"):
        Recipe(Plans(), Brightness(), renderer=renderer(kernel=ODE()), objectives={"image": GRPO()}, group_size=2)


def test_variants_share_weights():
    model = renderer()
    other = evolve(model, num_steps=9, kernel=ODE())
    assert other.module is model.module
    assert len(other.render(given(), draw=DRAW)[0].segments["image"].actions) == 9


# ---- Noised points ----


@pytest.mark.parametrize("kind", [Toy, ToyVariancePreserving])
def test_velocity_at_noised_points_is_the_flows_whatever_the_model_predicts(kind):
    """Data N(0, 4): E[ε | x] and E[x0 | x] are linear in x, so a model that knows them has a closed-form velocity."""

    class Knows(kind):
        def predict(self, x, inputs, conditions):
            if self.flow:
                t = inputs.reshape(-1, 1, 1, 1)
                return (t - 4 * (1 - t)) / (4 * (1 - t) ** 2 + t**2) * x
            alpha = self.pipe.scheduler.alphas_cumprod[inputs.long()].reshape(-1, 1, 1, 1)
            return (1 - alpha).sqrt() / (4 * alpha + 1 - alpha) * x

    t = torch.tensor([0.05, 0.3, 0.6, 0.9])
    x = torch.randn(4, *toy_family.SHAPE, generator=torch.Generator().manual_seed(0))
    found = velocity(Knows(), Guidance({"full": 1.0}), x, t, {"full": {"words": torch.zeros(4, 4)}})
    wide = t.reshape(-1, 1, 1, 1)
    expected = (wide - 4 * (1 - wide)) / (4 * (1 - wide) ** 2 + wide**2) * x
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # timesteps are whole numbers


# ---- Every objective learns from it, through the loop as it is ----


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (GRPO(clip=1e-3), {}),
        (DenoisingGRPO(), {}),
        (DenoisingGRPO(ratio="guard", kl=0.1, kl_on="velocities"), {"record_means": True}),
        (DiffusionNFT(), {"kernel": ODE(), "window": "early", "window_size": 3}),
        (AdvantageWeighted(times="logit-normal"), {"kernel": ODE()}),
        (DiffusionDPO(), {"kernel": ODE()}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", [Toy, ToyVariancePreserving])
def test_every_objective_makes_pictures_brighter(objective, settings, kind):
    model = renderer(kind, text="prompt", **settings)
    recipe = Recipe(
        Plans(),
        Brightness(),
        prompts=[Prompt(p, p) for p in ("a dog", "two cats")],
        renderer=model,
        objectives={"image": objective},
        group_size=8,
        prompts_per_step=2,
        steps=40,
        num_actions=2 if not objective.whole_groups else None,
        learning_rate=3e-3,
        weight_decay=0.0,
    )
    means = []

    def observe(event, **facts):
        if event == "rollout_end":
            totals = [v.total("image") for v in facts["verdicts"]]
            means.append(sum(totals) / len(totals))

    train(recipe, rollouts(recipe, recipe.read()), observe=observe)
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.03, means
