"""DenoisingGRPO against Flow-GRPO (arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319), number by number in float64."""

import math

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.flow_of_points import STAGE, Points, Rightmost, gradient, learned, recipe, rows_of

from reasonrl.errors import ConfigError, ContractError
from reasonrl.loop import train
from reasonrl.noise import normal
from reasonrl.objectives import DenoisingGRPO
from reasonrl.renderers.steps import FlowSDE, replay, step
from reasonrl.rollout import rollouts
from reasonrl.testing import check_objective
from reasonrl.types import Replay, Rewards, Segment, Stage, Trajectory

moderate = settings(max_examples=40, deadline=None)
F64 = torch.float64
KERNEL = FlowSDE(0.7)
SHAPE = (2, 2, 3)  # C, H, W: D = 12


def drawn(one):
    return one.next, one.log_prob


def apart(mask, values):
    """Returns (N, T, ...) with the (K, ...) values where the mask is True; whoever reads more gets NaN."""
    nothing = values.new_full((*mask.shape, *values.shape[1:]), torch.nan)
    return nothing.index_put(mask.nonzero(as_tuple=True), values)


class Walk(Points):
    """Draws a point by random steps, each an action; the prompt "long" records one step more than the others."""

    offers = {  # noqa: RUF012 - a property of the interface
        STAGE: frozenset({"log_probs", "mean", "std", "drawn_mean", "step_velocity", "step_size"})
    }

    def __init__(self, *, dtype=torch.float32, num_steps=4, reduce="mean"):
        super().__init__(dtype=dtype, num_steps=num_steps)
        self.reduce = reduce
        self.times = [1 - 0.9 * k / num_steps for k in range(num_steps + 1)]

    @torch.no_grad()
    def sample(self, prompts, *, group_size, draw):
        rows = [(p, (g,)) for p in prompts for g in range(group_size)]
        x = normal([draw.key(p.id, m, STAGE) for p, m in rows], 2).to(self.dtype)
        before, found = [], []
        for k in range(self.num_steps):
            s, s_next = self.times[k : k + 2]
            noise = normal([draw.key(p.id, m, STAGE, str(k)) for p, m in rows], 2).to(self.dtype)
            before.append(x)
            found.append(step(KERNEL, x, self._field(x, s), s, s_next, noise, reduce=self.reduce))
            x = found[-1].next
        return [self._one(*row, n, before, found) for n, row in enumerate(rows)]

    def _one(self, prompt, member, n, before, found):
        first = 0 if prompt.id == "long" else 1
        kept = found[first:]
        context = {
            "before": torch.stack([x[n] for x in before[first:]]),
            "times": torch.tensor([self.times[k : k + 2] for k in range(first, self.num_steps)], dtype=F64),
            "means": torch.stack([one.mean[n] for one in kept]),
        }
        mask = torch.ones(len(kept), dtype=torch.bool)
        actions, log_probs = (torch.stack([value[n] for value in each]) for each in zip(*map(drawn, kept), strict=True))
        segment = Segment(STAGE, member, actions, mask, log_probs, context)
        return Trajectory(prompt, member, {STAGE: segment}, artifacts={"point": tuple(actions[-1].tolist())})

    def _field(self, x, s):
        return self.module(x, torch.as_tensor(s, dtype=self.dtype).expand(len(x)))

    def replay(self, batch, needs):
        (wanted,) = needs.values()
        stage = batch.stages[STAGE]
        at = stage.mask.nonzero().tolist()
        x, means = (torch.stack([stage.context[key][n][t] for n, t in at]) for key in ("before", "means"))
        times = torch.stack([stage.context["times"][n][t] for n, t in at])
        s, s_next = times.unbind(1)
        v = self._field(x, s)
        found = replay(KERNEL, x, v, s, s_next, stage.actions[stage.mask], reduce=self.reduce)
        said = {"mean": found.mean, "std": found.std[:, 0], "drawn_mean": means}
        said |= {"step_velocity": v, "step_size": s - s_next}
        spread = {key: apart(stage.mask, value) for key, value in said.items() if key in wanted}
        return {STAGE: Replay(apart(stage.mask, found.log_prob), extras=spread)}


class Case:
    """N rows of T steps with means that have moved, and what was drawn; float64, NaN where the mask is False."""

    def __init__(self, seed, num=3, length=4, *, reduce="mean", far=0.02):
        generator = torch.Generator().manual_seed(seed)

        def some(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.mask = torch.rand(num, length, generator=generator) < 0.75
        self.mask[0, 0] = True
        wide = (num, length, *SHAPE)
        self.std = 0.1 + torch.rand(num, length, generator=generator, dtype=F64)
        self.size = 0.02 + 0.1 * torch.rand(num, length, generator=generator, dtype=F64)
        self.old, moved, away = some(*wide), some(*wide), some(*wide)
        beside = self.std[..., None, None, None]
        self.actions = self.old + beside * some(*wide)
        self.mean = (self.old + far * beside * moved).requires_grad_()
        self.reference = self.old + 0.3 * away
        self.v, self.v_reference = some(*wide).requires_grad_(), some(*wide)
        self.advantages = some(num)
        self.reduce = reduce
        for values in (self.actions, self.old, self.std, self.size, self.reference, self.v_reference):
            values[~self.mask] = torch.nan

    def density(self, mean):
        """(N, T): the normal's log-density as it is usually written, reduced."""
        mean, x, std = mean[self.mask], self.actions[self.mask], self.std[self.mask][:, None, None, None]
        every = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return apart(self.mask, every.sum((1, 2, 3)) if self.reduce == "sum" else every.mean((1, 2, 3)))

    @property
    def stage(self):
        num = len(self.mask)
        return Stage(
            STAGE,
            tuple(("p", (i,)) for i in range(num)),
            actions=self.actions,
            present=torch.ones_like(self.mask),
            mask=self.mask,
            advantages=self.advantages,
            groups=torch.zeros(num, dtype=torch.long),
            log_probs=self.density(self.old),
        )

    @property
    def replay(self):
        extras = {"mean": self.mean, "std": self.std, "drawn_mean": self.old}
        return Replay(self.density(self.mean), extras={**extras, "step_velocity": self.v, "step_size": self.size})

    @property
    def frozen(self):
        return {"reference": Replay(extras={"mean": self.reference, "step_velocity": self.v_reference})}

    def rows(self, part):
        """The same with these rows alone."""
        stage, replayed = self.stage, self.replay
        cut = evolve(
            stage,
            **{k: getattr(stage, k)[part] for k in ("actions", "present", "mask", "advantages", "groups", "log_probs")},
        )
        frozen = {"reference": Replay(extras={k: v[part] for k, v in self.frozen["reference"].extras.items()})}
        return cut, Replay(replayed.log_probs[part], extras={k: v[part] for k, v in replayed.extras.items()}), frozen


def published(case, n, t, *, objective):
    """One action's loss: Flow-GRPO's objective (section 4.1) with its closed form of the KL (section 4.2).

    GRPO-Guard's log-ratio is std times the raw one plus the squared move over 2 std.
    """
    over = torch.sum if case.reduce == "sum" else torch.mean
    mean, old, std, x = case.mean[n, t], case.old[n, t], case.std[n, t], case.actions[n, t]
    raw = over(((x - old) ** 2 - (x - mean) ** 2) / (2 * std**2))
    log_rho = std * raw + over((mean - old) ** 2) / (2 * std) if objective.ratio == "guard" else raw
    rho, a = log_rho.exp(), case.advantages[n]
    high = objective.clip if objective.clip_high is None else objective.clip_high
    surrogate = -torch.minimum(rho * a, rho.clamp(1 - objective.clip, 1 + high) * a)
    g2 = std**2 / case.size[n, t]
    gap = (mean - case.reference[n, t]) ** 2
    distance = {
        "means": over(gap) / (2 * g2 * case.size[n, t]),
        "means_over_g": over(gap) / (2 * g2),
        "velocities": over((case.v[n, t] - case.v_reference[n, t]) ** 2),
    }[objective.kl_on]
    return surrogate + objective.kl * distance, log_rho, distance


objectives = st.builds(
    DenoisingGRPO,
    clip=st.sampled_from([1e-4, 0.01, 0.2]),
    clip_high=st.sampled_from([None, 0.02]),
    ratio=st.sampled_from(["likelihood", "means", "guard"]),
    kl=st.sampled_from([0.0, 0.04]),
    kl_on=st.sampled_from(["means", "means_over_g", "velocities"]),
    reduce=st.sampled_from(["mean", "sum"]),
)


@moderate
@given(objectives, st.integers(0, 10_000), st.sampled_from([0.002, 0.1]))
def test_loss_gradient_and_metrics_are_the_papers(objective, seed, far):
    case = Case(seed, reduce=objective.reduce, far=far)
    found = objective.loss(case.stage, case.replay, case.frozen)
    each = [published(case, n, t, objective=objective) for n, t in case.mask.nonzero().tolist()]
    expected = sum(loss for loss, _, _ in each)
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-9)
    wanted = (case.mean, case.v) if objective.kl and objective.kl_on == "velocities" else (case.mean,)
    ours, theirs = (torch.autograd.grad(total, wanted) for total in (found.total, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    log_rhos = torch.stack([log_rho for _, log_rho, _ in each]).detach()
    torch.testing.assert_close(found.metrics["ratio"], log_rhos.exp().sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.metrics["log_ratio"], log_rhos.sum(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.metrics["log_ratio_size"], log_rhos.abs().sum(), rtol=1e-7, atol=1e-9)
    a = torch.stack([case.advantages[n] for n, _ in case.mask.nonzero().tolist()])
    high = objective.clip if objective.clip_high is None else objective.clip_high
    low = ((log_rhos.exp() < 1 - objective.clip) & (a < 0)).sum()
    assert found.metrics["clip_low_frac"] == low
    assert found.metrics["clip_high_frac"] == ((log_rhos.exp() > 1 + high) & (a > 0)).sum()
    assert ("kl" in found.metrics) == bool(objective.kl)
    if objective.kl:
        torch.testing.assert_close(found.metrics["kl"], sum(d for _, _, d in each).detach(), rtol=1e-9, atol=1e-9)


@moderate
@given(objectives, st.integers(0, 10_000))
def test_rows_and_what_is_not_trained_are_independent(objective, seed):
    case = Case(seed, reduce=objective.reduce)  # NaN wherever the mask is False
    whole = objective.loss(case.stage, case.replay, case.frozen)
    parts = [objective.loss(*case.rows(part)) for part in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(whole.total, sum(p.total for p in parts), rtol=1e-10, atol=1e-10)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, sum(p.metrics[name] for p in parts), rtol=1e-10, atol=1e-10, msg=name)
    (slope,) = torch.autograd.grad(whole.total, case.mean)
    assert slope.isfinite().all()
    assert not slope[~case.mask].any()
    nobody = evolve(case.stage, mask=torch.zeros_like(case.mask))
    assert objective.loss(nobody, case.replay, case.frozen).total == 0


@moderate
@given(st.sampled_from(["likelihood", "means", "guard"]), st.sampled_from(["mean", "sum"]), st.integers(0, 10_000))
def test_before_the_first_update_the_gradient_is_the_plain_policy_gradient(ratio, reduce, seed):
    """-A grad log p(x'), or std times that for GRPO-Guard; its ratio is 1 and nothing is clipped."""
    case = Case(seed, reduce=reduce, far=0.0)
    found = DenoisingGRPO(ratio=ratio, reduce=reduce).loss(case.stage, case.replay, {})
    (slope,) = torch.autograd.grad(found.total, case.mean)
    weight = case.std if ratio == "guard" else torch.ones_like(case.std)
    plain = -(case.advantages[:, None] * weight * case.density(case.mean))[case.mask].sum()
    torch.testing.assert_close(slope, torch.autograd.grad(plain, case.mean)[0], rtol=1e-9, atol=1e-10)
    num = case.mask.sum().to(F64)
    torch.testing.assert_close(found.metrics["ratio"], num)
    assert found.metrics["clip_low_frac"] == found.metrics["clip_high_frac"] == 0


def test_one_step_by_hand():
    """x' - old = 0.5, mean - old = 0.1, std 0.5, so z = 1, u = 0.2: ln rho = 0.18, guard's 0.1; s - s' = 0.1."""
    stage = Stage(
        STAGE,
        (("p", (0,)),),
        actions=torch.full((1, 1, 1, 1, 1), 0.5),
        present=torch.ones(1, 1, dtype=torch.bool),
        mask=torch.ones(1, 1, dtype=torch.bool),
        advantages=torch.tensor([2.0]),
        groups=torch.zeros(1, dtype=torch.long),
    )
    extras = {"drawn_mean": torch.zeros(1, 1, 1, 1, 1), "mean": torch.full((1, 1, 1, 1, 1), 0.1)}
    extras |= {"std": torch.tensor([[0.5]]), "step_size": torch.tensor([[0.1]])}
    frozen = {"reference": Replay(extras={"mean": torch.full((1, 1, 1, 1, 1), -0.1)})}
    expected = {("means", "means"): -2 * math.exp(0.18) + 0.08, ("guard", "means_over_g"): -2 * math.exp(0.1) + 0.008}
    for (ratio, kl_on), value in expected.items():
        objective = DenoisingGRPO(clip=0.5, ratio=ratio, kl=1.0, kl_on=kl_on)
        assert objective.loss(stage, Replay(extras=extras), frozen).total.item() == pytest.approx(value, abs=1e-6)


def test_only_what_the_fields_ask_for_is_needed():
    assert DenoisingGRPO().needs == {"log_probs"}
    assert DenoisingGRPO(ratio="guard").needs == DenoisingGRPO(ratio="means").needs == {"mean", "std", "drawn_mean"}
    assert DenoisingGRPO(kl=0.1).needs == {"log_probs", "mean", "std"}
    assert DenoisingGRPO(kl=0.1, kl_on="means_over_g").needs == {"log_probs", "mean", "std", "step_size"}
    assert DenoisingGRPO(kl=0.1, kl_on="velocities").needs == {"log_probs", "step_velocity"}
    assert DenoisingGRPO().shadows == {}
    assert {name: decay(7) for name, decay in DenoisingGRPO(kl=0.1).shadows.items()} == {"reference": 1.0}
    policy = Walk()
    policy.offers = {STAGE: frozenset({"log_probs", "mean", "std"})}
    with pytest.raises(ConfigError, match=r"DenoisingGRPO needs \['drawn_mean'\] of stage 'point'"):
        recipe(DenoisingGRPO(ratio="guard"), policy=policy)


def test_advantages_are_bounded_and_scaled_by_the_group_or_by_the_step():
    values = torch.tensor([[0.0, 1.0, 0.0, 0.1] + [0.0] * 39 + [1.0]], dtype=F64)
    groups = torch.tensor([0, 0, 1, 1] + [2] * 40)
    rewards = Rewards(("r",), values, torch.ones_like(values, dtype=torch.bool), torch.ones(1, dtype=F64), groups)
    by_group, _ = DenoisingGRPO().advantages(rewards)
    assert by_group.abs().max() == 5  # 1 of 40: 6.2 standard deviations
    torch.testing.assert_close(by_group[1], by_group[3], rtol=1e-2, atol=0)
    by_step, _ = DenoisingGRPO(scale="batch_std").advantages(rewards)
    torch.testing.assert_close(by_step[1], 10 * by_step[3])
    torch.testing.assert_close(by_step[1].double(), 0.5 / (values.std() + 1e-4), rtol=1e-6, atol=0)
    plain, _ = DenoisingGRPO(scale="none").advantages(rewards)
    torch.testing.assert_close(plain[:4], torch.tensor([-0.5, 0.5, -0.05, 0.05]))


@pytest.mark.parametrize(
    "how",
    [{"num_rows": 3}, {"num_actions": 1}, {"num_rows": 5, "num_actions": 2}, {"parts": (slice(0, 8), slice(8, None))}],
)
@pytest.mark.parametrize(
    "objective",
    [
        DenoisingGRPO(clip=0.01, kl=0.1, kl_on="means_over_g"),
        DenoisingGRPO(clip=0.01, ratio="guard", kl=0.1, kl_on="velocities"),
    ],
    ids=["likelihood", "guard"],
)
def test_micro_batches_windows_and_processes_leave_the_gradient_alone(objective, how):
    asked = recipe(objective, policy=Walk(dtype=F64), steps=1, group_size=4)
    rows = rows_of(asked)
    expected = gradient(asked, rows, moved=0.01)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(asked, rows, moved=0.01, **how), expected, rtol=1e-10, atol=1e-10)


def test_unscored_rows_contribute_nothing():
    judge = Rightmost(unscored=frozenset({2}))
    asked = recipe(DenoisingGRPO(ratio="means"), policy=Walk(dtype=F64), judge=judge, steps=1, group_size=4)
    expected = gradient(asked, rows_of(asked), moved=1e-4)
    assert expected.abs().max() > 0

    def spoiled(trajectory):
        if trajectory.member != (2,):
            return trajectory
        segment = trajectory.segments[STAGE]
        spoilt = evolve(segment, actions=torch.full_like(segment.actions, torch.nan))
        return evolve(trajectory, segments={STAGE: spoilt})

    assert torch.equal(gradient(asked, rows_of(asked, spoil=spoiled), moved=1e-4), expected)


@pytest.mark.parametrize("ratio", ["likelihood", "means", "guard"])
def test_the_first_pass_of_the_loop_has_ratio_one_in_every_form(ratio):
    asked = recipe(DenoisingGRPO(ratio=ratio), policy=Walk(), steps=1, group_size=4)
    seen = {}
    train(asked, rollouts(asked, asked.prompts), observe=lambda event, **facts: seen.update(facts))
    assert seen["metrics"][f"{STAGE}/ratio"] == pytest.approx(1, abs=1e-6)
    assert seen["metrics"][f"{STAGE}/log_ratio_size"] < 1e-6
    assert seen["grad_norm"] > 0


def test_steps_without_a_density_and_wrong_shapes_are_refused_in_one_line():
    case = Case(0)
    cases = {
        "stage 'point' has no log-probs: its steps are deterministic": lambda: DenoisingGRPO().loss(
            evolve(case.stage, log_probs=None), case.replay, {}
        ),
        r"replay of 'point' returned 'mean' of \(3, 4, 2\), expected \(3, 4, 2, 2, 3\)": lambda: DenoisingGRPO(
            ratio="means"
        ).loss(case.stage, evolve(case.replay, extras={**case.replay.extras, "mean": torch.zeros(3, 4, 2)}), {}),
        "a step of std 0 has no density": lambda: DenoisingGRPO(ratio="means").loss(
            case.stage, evolve(case.replay, extras={**case.replay.extras, "std": torch.zeros(3, 4)}), {}
        ),
    }
    for message, attempt in cases.items():
        with pytest.raises(ContractError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"clip": 0}, {"clip_high": 0}, {"kl": -1}, {"most": 0}, {"ratio": "raw"}, {"kl_on": "x"}, {"reduce": "max"}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DenoisingGRPO(**settings)


@pytest.mark.parametrize("objective", [DenoisingGRPO(), DenoisingGRPO(kl=0.1, scale="batch_std", ratio="guard")])
def test_the_contract_is_kept(objective):
    check_objective(objective)


@pytest.mark.parametrize(
    "objective",
    [DenoisingGRPO(), DenoisingGRPO(ratio="guard", kl=0.01, kl_on="velocities")],
    ids=["likelihood", "guard"],
)
def test_a_flow_learns_the_preferred_mode(objective):
    before, after = learned(objective, policy=Walk())
    assert before < 0.65
    assert after > 0.9
