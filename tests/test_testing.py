import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve, field, frozen
from hypothesis import find, given, settings
from PIL import Image
from torch import nn

from reasonrl import testing
from reasonrl.errors import ContractError
from reasonrl.interfaces import Judge, Objective, PointwiseJudge, Policy, Renderer
from reasonrl.noise import uniform
from reasonrl.testing import (
    ToyJudge,
    ToyRenderer,
    check_judge,
    check_objective,
    check_policy,
    check_renderer,
    sample_trajectories,
)
from reasonrl.types import EVERY, Loss, Prompt, Segment, Term, Trajectory, Verdict


def refusal(check, *args) -> str:
    with pytest.raises(ContractError) as caught:
        check(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(type(args[0]).__name__)
    return message


# ---- Judges: one that breaks each promise ----------------------------------------------------


def judged_as(answer):
    """Returns a judge class whose judge() is `answer`, and that pickle can find."""
    return frozen(type(answer.__name__, (Judge,), {"judge": answer, "__module__": __name__}))


@judged_as
def TooFew(self, trajectories):
    return [Verdict.of("a", 1.0)] * (len(trajectories) - 1)


@judged_as
def NotAVerdict(self, trajectories):
    return [1.0] * len(trajectories)


@judged_as
def NotFinite(self, trajectories):
    return [Verdict.of("a", float("nan")) for _ in trajectories]


@judged_as
def NotAFloat(self, trajectories):
    return [Verdict.of("a", np.float32(0.5)) for _ in trajectories]


@judged_as
def OtherTerms(self, trajectories):
    return [Verdict.of("a" if t.image else "b", 1.0) for t in trajectories]


@judged_as
def OtherStages(self, trajectories):
    return [Verdict({"image": (Term("a", 1.0),)}) for _ in trajectories]


@judged_as
def Random(self, trajectories):
    return [Verdict.of("a", float(np.random.default_rng().random())) for _ in trajectories]


@judged_as
def ByPosition(self, trajectories):
    return [Verdict.of("a", float(n)) for n, _ in enumerate(trajectories)]


@judged_as
def NeedsAnImage(self, trajectories):
    return [Verdict.of("a", float(t.image.size[0])) for t in trajectories]


@judged_as
def NeedsText(self, trajectories):
    return [Verdict.of("a", float(len(t.texts["reasoning"]))) for t in trajectories]


@judged_as
def Scribbles(self, trajectories):
    for trajectory in trajectories:
        if trajectory.image:
            trajectory.image.putpixel((0, 0), (1, 2, 3))
    return [Verdict.of("a", 1.0) for _ in trajectories]


class NoEquality(PointwiseJudge):
    def score(self, trajectory):
        return 1.0


@frozen
class NoNeeds(PointwiseJudge):
    needs = ("image",)

    def score(self, trajectory):
        return 1.0


@frozen
class Heavy(PointwiseJudge):
    weights: bytes = bytes(2_000_000)

    def score(self, trajectory):
        return 1.0


@frozen(eq=False)
class Hoarding(PointwiseJudge):
    memory: dict = field(factory=dict)

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 0

    def __repr__(self):
        return "Hoarding()"

    def score(self, trajectory):
        self.memory["weights"] = bytes(2_000_000)
        return 1.0


@frozen
class Lambda(PointwiseJudge):
    ask: object = lambda text: 1.0  # a field that no pickle can carry

    def score(self, trajectory):
        return self.ask(trajectory.reasoning)


@frozen
class Lazy(PointwiseJudge):
    """The right way: weights in a cached_property stay at home."""

    @cached_property
    def weights(self):
        return bytes(2_000_000)

    def score(self, trajectory):
        return None if trajectory.image is None else float(len(self.weights))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (TooFew(), "returned 1 verdicts for 2 trajectories"),
        (NotAVerdict(), "returned float where verdicts belong"),
        (NotFinite(), "returned [nan, nan] for plan: a value is a finite float or None"),
        (NotAFloat(), "a value is a finite float or None"),
        (OtherTerms(), "gave different (stage, term, weight): [('*', 'a', 1.0)]"),
        (OtherStages(), "spoke of ['image'] for plan: its stages are {'*'}"),
        (Random(), "asked twice, answered"),
        (ByPosition(), "shown the groups in another order, answered"),
        (NeedsAnImage(), "raised AttributeError ('NoneType' object has no attribute 'size') when"),
        (NeedsText(), "raised KeyError ('reasoning') when shown no-text: what is missing"),
        (Scribbles(), "changed what it was shown"),
        (NoEquality(), "is not equal to its pickled copy: make it an attrs @frozen class"),
        (NoNeeds(), "has needs ('image',), expected a frozenset of str"),
        (Heavy(), "bytes: load weights in a cached_property"),
        (Hoarding(), "bytes: load weights in a cached_property"),
        (Lambda(), "cannot be pickled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_judge_names_the_promise_that_was_broken(judge, message):
    assert message in refusal(check_judge, judge)


@pytest.mark.parametrize(
    "judge",
    [
        ToyJudge(),
        Lazy(),
        0.5 * ToyJudge().on("reasoning") + Lazy().on("image"),
        (ToyJudge() * Lazy()).named("gate"),
    ],
    ids=str,
)
def test_check_judge_accepts_good_judges_and_their_expressions(judge):
    check_judge(judge)


# ---- Renderers -------------------------------------------------------------------------------


def shade(trajectory: Trajectory, level: float) -> Trajectory:
    image = Image.new("L", (4, 4), int(level))
    return evolve(trajectory, images={"image": image})


def rendered_as(answer):
    return type(answer.__name__, (Renderer,), {"render": answer})


@rendered_as
def Branching(self, trajectories, *, draw):
    children = [evolve(t, member=(*t.member, k)) for t in trajectories for k in (0, 1)]
    keys = [draw.key(c.prompt.id, c.member, "image") for c in children]
    return [shade(c, 255 * u) for c, u in zip(children, uniform(keys).tolist(), strict=True)]


@rendered_as
def Backwards(self, trajectories, *, draw):
    return [shade(t, 0) for t in trajectories[::-1]]


@rendered_as
def Drops(self, trajectories, *, draw):
    return [shade(t, 0) for t in trajectories[1:]]


@rendered_as
def Doubles(self, trajectories, *, draw):
    return [shade(t, 0) for t in trajectories for _ in range(2)]


@rendered_as
def Invents(self, trajectories, *, draw):
    return [shade(evolve(t, member=(9, 9)), 0) for t in trajectories]


@rendered_as
def Forgets(self, trajectories, *, draw):
    return [shade(evolve(t, texts={}), 0) for t in trajectories]


@rendered_as
def Nothing(self, trajectories, *, draw):
    return list(trajectories)


@rendered_as
def Arrays(self, trajectories, *, draw):
    return [evolve(t, images={"image": np.zeros((4, 4))}) for t in trajectories]


@rendered_as
def Dice(self, trajectories, *, draw):
    levels = np.random.default_rng().integers(0, 255, len(trajectories))
    return [shade(t, level) for t, level in zip(trajectories, levels, strict=True)]


@rendered_as
def ByRow(self, trajectories, *, draw):
    return [shade(t, 20 * n) for n, t in enumerate(trajectories)]


@pytest.mark.parametrize(
    ("renderer", "message"),
    [
        (Backwards(), "expected [('plan', (0,)), ('plan', (1,)),"),
        (Drops(), "returned [('plan', (1,)),"),
        (Doubles(), "more than once: members are distinct"),
        (Invents(), "returned ('plan', (9, 9)), no child of what it was given"),
        (Forgets(), "lost a text or a segment of ('plan', (0,))"),
        (Nothing(), "drew none of 12 trajectories: pass some it can draw"),
        (Arrays(), "drew ['ndarray']: an image is a PIL.Image.Image"),
        (Dice(), "drew two images from one draw"),
        (ByRow(), "drew by row order: address noise by Draw.key"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_renderer_names_the_promise_that_was_broken(renderer, message):
    assert message in refusal(check_renderer, renderer)


@pytest.mark.parametrize("renderer", [ToyRenderer(), Branching()], ids=lambda one: type(one).__name__)
def test_check_renderer_accepts_good_renderers(renderer):
    check_renderer(renderer)
    check_renderer(renderer, sample_trajectories()[:2])


# ---- Policies --------------------------------------------------------------------------------


class Dots(Policy):
    """Three uniform actions in 0..999 a row, addressed as they should be."""

    stages = ("reasoning",)
    offers = {"reasoning": frozenset({"log_probs"})}  # noqa: RUF012 - a test's toy
    module = nn.Linear(1, 1)

    def key(self, draw, prompt, member, row):
        return draw.key(prompt.id, (member,), "reasoning")

    def segment(self, member, actions):
        log_probs = torch.full((3,), -6.9)
        return Segment("reasoning", member, actions, torch.ones(3, dtype=torch.bool), log_probs)

    def sample(self, prompts, *, group_size, draw):
        rows = [(prompt, member) for prompt in prompts for member in range(group_size)]
        keys = [self.key(draw, prompt, g, row) for row, (prompt, g) in enumerate(rows)]
        drawn = (1000 * uniform(keys, 3)).long()
        return [
            Trajectory(prompt, (g,), segments={"reasoning": self.segment((g,), actions)})
            for (prompt, g), actions in zip(rows, drawn, strict=True)
        ]

    def replay(self, batch, needs):
        raise NotImplementedError

    def save(self, folder):
        raise NotImplementedError


class BlindToSeeds(Dots):
    def key(self, draw, prompt, member, row):
        return evolve(draw, seed=0).key(prompt.id, (member,), "reasoning")


class KeyedByRow(Dots):
    def key(self, draw, prompt, member, row):
        return draw.key("", (row,), "reasoning")


class Unrepeatable(Dots):
    def key(self, draw, prompt, member, row):
        return int(np.random.default_rng().integers(2**31))


class Interleaved(Dots):
    def sample(self, prompts, *, group_size, draw):
        return sorted(super().sample(prompts, group_size=group_size, draw=draw), key=str_member)


class Twins(Dots):
    def sample(self, prompts, *, group_size, draw):
        rows = super().sample(prompts, group_size=group_size, draw=draw)
        return [evolve(row, member=(0,)) for row in rows]


class HalfPrecision(Dots):
    def segment(self, member, actions):
        segment = super().segment(member, actions)
        return evolve(segment, log_probs=segment.log_probs.half())


class WithGradient(Dots):
    def segment(self, member, actions):
        segment = super().segment(member, actions)
        return evolve(segment, log_probs=segment.log_probs.requires_grad_())


class OtherStage(Dots):
    def segment(self, member, actions):
        return evolve(super().segment(member, actions), stage="image")


class OtherMember(Dots):
    def segment(self, member, actions):
        return evolve(super().segment(member, actions), member=(7,))


class OffersNothing(Dots):
    offers = {}  # noqa: RUF012


class NewModules(Dots):
    @property
    def module(self):
        return nn.Linear(1, 1)


def str_member(row):
    return row.member


PROMPTS = [Prompt(name, f"a {name} cup") for name in ("red", "blue")]


def test_check_policy_accepts_a_good_policy():
    check_policy(Dots(), PROMPTS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BlindToSeeds, "drew the same actions from another seed"),
        (KeyedByRow, "kept 0% of its actions when prompts changed places"),
        (Unrepeatable, "drew two sets of actions from one draw"),
        (Interleaved, "returned rows of ['red', 'blue', 'red',"),
        (Twins, "more than once: members are distinct"),
        (HalfPrecision, "log_probs are not finite float32"),
        (WithGradient, "log_probs are not finite float32"),
        (OtherStage, "of stage 'image': its stages are ('reasoning',)"),
        (OtherMember, "at (7,), which is no start of the row's member"),
        (OffersNothing, "offers nothing for its stages ['reasoning']"),
        (NewModules, "has another module at every call"),
    ],
)
def test_check_policy_names_the_promise_that_was_broken(kind, message):
    assert message in refusal(check_policy, kind(), PROMPTS)


# ---- Objectives ------------------------------------------------------------------------------


class Centred(Objective):
    """Reward minus the group's mean; gaps below 1e-9 are rounding."""

    tolerance = 1e-9

    def advantages(self, rewards):
        found = torch.zeros_like(rewards.total)
        for group in rewards.groups.unique():
            rows = (rewards.groups == group) & rewards.complete
            total = rewards.total[rows]
            if len(total) > 1 and total.max() - total.min() > self.tolerance:
                found[rows] = self.scaled(total - total.mean())
        return found.float(), rewards.complete

    def scaled(self, centred):
        return centred

    def loss(self, stage, replay, frozen):
        return Loss(torch.zeros(()))


class Standardised(Centred):
    """Divides by the standard deviation with no tolerance: rounding noise becomes a gradient."""

    tolerance = 0.0

    def scaled(self, centred):
        return centred / centred.std(correction=0)


class StepScaled(Centred):
    """Divides by a statistic of the whole step, which is allowed."""

    def advantages(self, rewards):
        found, takes_part = super().advantages(rewards)
        return found / found.abs().max().clamp(min=1e-6), takes_part


class OneBaseline(Centred):
    def advantages(self, rewards):
        centred = rewards.total - rewards.total[rewards.complete].mean()
        fine = rewards.complete & (centred.abs() > 1e-9)
        return (centred * fine).float(), rewards.complete


class UnscoredIsZero(Centred):
    def advantages(self, rewards):
        complete = torch.ones_like(rewards.scored)
        found, _ = super().advantages(evolve(rewards, scored=complete))
        return found * rewards.complete, rewards.complete


class TrainsUnscored(Centred):
    def advantages(self, rewards):
        found, takes_part = super().advantages(rewards)
        return found, torch.ones_like(takes_part)


class ByOrder(Centred):
    def advantages(self, rewards):
        found, takes_part = super().advantages(rewards)
        found[0] *= 2
        return found, takes_part


class Doubles64(Centred):
    def advantages(self, rewards):
        found, takes_part = super().advantages(rewards)
        return found.double(), takes_part


class Infinite(Centred):
    def scaled(self, centred):
        return centred / 0


class MeanCount(Centred):
    def count(self, mask):
        return mask.float().mean()


class Indifferent(Centred):
    """Supervised: every draw takes part with advantage 1, whatever a judge says."""

    def advantages(self, rewards):
        return torch.ones(len(rewards.groups)), torch.ones(len(rewards.groups), dtype=torch.bool)


@pytest.mark.parametrize("kind", [Centred, StepScaled, Indifferent])
def test_check_objective_accepts_good_objectives(kind):
    check_objective(kind())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Standardised, "to equal rewards"),
        (OneBaseline, "let one group change the advantages within another"),
        (UnscoredIsZero, "let an unscored draw move its group"),
        (TrainsUnscored, "let an unscored draw take part in the loss"),
        (ByOrder, "gave other advantages to draws in another order"),
        (Doubles64, "returned [((12,), torch.float64), ((12,), torch.bool)], expected"),
        (Infinite, "gave advantages [-inf"),
        (MeanCount, "in two parts"),
    ],
)
def test_check_objective_names_the_promise_that_was_broken(kind, message):
    assert message in refusal(check_objective, kind())


# ---- Samples and strategies ------------------------------------------------------------------


def test_the_samples_are_whole_groups_with_and_without_what_judges_read():
    rows = sample_trajectories()
    assert [row.member for row in rows] == [(0,), (1,)] * (len(rows) // 2)
    assert {row.prompt.id for row in rows if row.image is None} == {"no-image"}
    assert {row.prompt.id for row in rows if row.reasoning is None} == {"no-text"}
    assert {row.prompt.id for row in rows if row.reasoning == ""} == {"empty-text"}


def test_the_toy_renderer_draws_a_gray_that_the_text_chooses():
    rows = sample_trajectories()
    assert rows[0].image.size == (32, 32)
    assert rows[0].image.tobytes() == sample_trajectories()[0].image.tobytes()
    assert len({row.image.tobytes() for row in rows if row.image}) > 4


@given(testing.prompts())
def test_drawn_prompts_say_something(prompt):
    assert prompt.text.strip()
    assert prompt.id


@given(testing.trajectories())
def test_any_drawn_trajectory_can_be_judged(trajectory):
    (verdict,) = ToyJudge().judge([trajectory])
    assert 0 <= verdict.total(EVERY) <= 1


@given(testing.rewards())
def test_drawn_rewards_are_well_formed(rewards):
    num_terms, num_draws = rewards.values.shape
    assert rewards.scored.shape == (num_terms, num_draws)
    assert rewards.groups.shape == (num_draws,)
    assert len(rewards.names) == len(rewards.weights) == num_terms
    assert not rewards.values[~rewards.scored].any()
    assert rewards.values.dtype == rewards.weights.dtype == torch.float64
    assert (rewards.scored.dtype, rewards.groups.dtype) == (torch.bool, torch.int64)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda r: {0.3, 0.1 + 0.2} <= set(r.values[:, r.groups == 0].flatten().tolist()),
        lambda r: not r.complete.all(),
        lambda r: len(set(r.groups.bincount().tolist())) > 1,
        lambda r: not torch.equal(r.groups, r.groups.sort().values),
    ],
    ids=["near-equal group", "unscored", "ragged", "interleaved"],
)
def test_drawn_rewards_include_the_awkward_cases(wanted):
    quick = settings(max_examples=2000, derandomize=True)
    assert find(testing.rewards(), wanted, settings=quick) is not None


def test_the_module_can_be_imported_without_hypothesis():
    source = Path(testing.__file__).read_text()
    assert not re.search(r"^(import|from) hypothesis", source, re.MULTILINE)
