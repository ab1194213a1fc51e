import math

import pytest
import torch
from attrs import evolve, frozen
from torch import nn

from reasonrl.interfaces import Objective, PointwiseJudge, Policy
from reasonrl.kernels import log_softmax, selective_log_prob
from reasonrl.loop import Learner, train
from reasonrl.noise import choose, uniform
from reasonrl.objectives import GRPO, Supervised
from reasonrl.recipe import Recipe
from reasonrl.rollout import rollouts
from reasonrl.types import Loss, Prompt, Replay, Segment, Stop, Trajectory
from reasonrl.weights import Weights

VOCABULARY, LONGEST, NUM_IMAGE_TOKENS = 5, 5, 3
END = 0
PROMPTS = tuple(Prompt(name, f"draw {name}") for name in "abcd")


class Tables(nn.Module):
    """Next-token logits by previous token, one table a stage; the last row starts a sequence."""

    def __init__(self):
        super().__init__()
        start = torch.randn(2, VOCABULARY + 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.reasoning = nn.Parameter(0.5 * start[0])
        self.image = nn.Parameter(0.5 * start[1])

    def forward(self, stage, previous):
        return getattr(self, stage)[previous]


class Toy(Policy):
    """Writes a text until END, and three image tokens unless the text was cut (a forced END)."""

    stages = ("reasoning", "image")
    offers = dict.fromkeys(stages, frozenset({"log_probs", "entropy"}))
    provides = frozenset({"tokens"})

    def __init__(self):
        self._module = Tables()

    @property
    def module(self):
        return self._module

    def sample(self, prompts, *, group_size, draw):
        with torch.no_grad():
            return [self._one(p, (g,), draw) for p in prompts for g in range(group_size)]

    def _one(self, prompt, member, draw):
        text, ended = self._draw("reasoning", prompt, member, draw, LONGEST)
        segments = {"reasoning": text}
        if ended:
            segments["image"], _ = self._draw("image", prompt, member, draw, NUM_IMAGE_TOKENS)
        said = {name: segment.actions.tolist() for name, segment in segments.items()}
        stop = Stop.END if ended else Stop.LENGTH
        texts = {"reasoning": " ".join(map(str, said["reasoning"]))}
        return Trajectory(prompt, member, segments, texts, artifacts={"tokens": said}, stop=stop)

    def _draw(self, stage, prompt, member, draw, length):
        (uniforms,) = uniform([draw.key(prompt.id, member, stage)], length)
        tokens, log_probs, previous = [], [], VOCABULARY
        for u in uniforms:
            every = log_softmax(self.module(stage, torch.tensor([previous])))
            previous = choose(every, u[None]).item()
            tokens.append(previous)
            log_probs.append(every[0, previous].item())
            if stage == "reasoning" and previous == END:
                break
        ended = tokens[-1] == END or stage == "image"
        mask = [True] * len(tokens) + ([] if ended else [False])
        tokens, log_probs = (tokens, log_probs) if ended else ([*tokens, END], [*log_probs, 0.0])
        actions = torch.tensor(tokens)
        return Segment(stage, member, actions, torch.tensor(mask), torch.tensor(log_probs)), ended

    def replay(self, batch, needs):
        return {name: self._replayed(batch.stages[name]) for name in needs}

    def _replayed(self, stage):
        start = torch.full_like(stage.actions[:, :1], VOCABULARY)
        logits = self.module(stage.name, torch.cat([start, stage.actions[:, :-1]], 1))
        found = selective_log_prob(logits, stage.actions, return_entropy=True)
        return Replay(found.log_prob, found.entropy)

    def save(self, folder):
        raise NotImplementedError


@frozen
class Twos(PointwiseJudge):
    """The share of image tokens that are 2; a text that was cut has none."""

    def score(self, trajectory):
        found = trajectory.artifacts["tokens"].get("image", [])
        return found.count(2) / NUM_IMAGE_TOKENS


@frozen
class Wordy(PointwiseJudge):
    """The share of text tokens that are not 1: every stage has a gradient."""

    def score(self, trajectory):
        found = trajectory.artifacts["tokens"]["reasoning"]
        return 1 - found.count(1) / len(found)


class Broken(Objective):
    """Supervised learning whose loss is not a number at the first `num_broken` calls."""

    def __init__(self, num_broken):
        self.left = num_broken

    def advantages(self, rewards):
        return Supervised().advantages(rewards)

    def loss(self, stage, replay, frozen):
        self.left -= 1
        found = Supervised().loss(stage, replay, frozen)
        return Loss(found.total * math.nan) if self.left >= 0 else found


@frozen(eq=False)
class Shadowed(Objective):
    """Supervised learning that also replays named weights, and says what they said."""

    shadows: dict

    def advantages(self, rewards):
        return Supervised().advantages(rewards)

    def loss(self, stage, replay, frozen):
        found = {name: frozen[name].log_probs[stage.mask].sum() for name in self.shadows}
        return Loss(-replay.log_probs[stage.mask].sum(), found)


def recipe(**changes):
    given = {} if "objectives" in changes else {"objective": GRPO()}
    default = {
        "policy": Toy(),
        "judge": Twos() + Wordy(),
        "prompts": PROMPTS,
        "steps": 1,
        "prompts_per_step": 3,
        "group_size": 4,
        "learning_rate": 0.05,
        "max_grad_norm": 1e9,
    }
    return Recipe(**{**default, **given, **changes})


def run(recipe, *, learner=None, experience=None):
    """Trains, and returns the facts of each event by its name."""
    events = {"rollout_end": [], "backward_end": [], "update_end": [], "step_end": []}
    train(
        recipe,
        experience or rollouts(recipe, recipe.prompts),
        learner=learner,
        observe=lambda event, **facts: events[event].append(facts),
    )
    return events


def descending(recipe):
    """Returns a learner by plain gradient descent: one step moves by the gradient times the rate."""
    learner = Learner.of(recipe)
    learner.optimizer = torch.optim.SGD(learner.parameters, lr=1.0)
    return learner


def parameters(recipe):
    return {k: p.detach().clone() for k, p in recipe.policy.module.named_parameters()}


def equal(one, other):
    return {k for k in one if torch.equal(one[k], other[k])}


def log_prob_of_starts(recipe):
    """The log-probs of a stage's first token, under the current weights."""
    with torch.no_grad():
        first = torch.tensor([VOCABULARY])
        return torch.cat([log_softmax(recipe.policy.module(s, first)) for s in recipe.policy.stages])


# ---- Gradients -------------------------------------------------------------------------------


def after_one_step(**changes):
    asked = recipe(learning_rate=1.0, prompts_per_step=4, **changes)
    events = run(asked, learner=descending(asked))
    return parameters(asked), events


@pytest.mark.parametrize(
    "objectives",
    [
        {"reasoning": GRPO(), "image": GRPO(kl=0.1)},
        {("reasoning", "image"): GRPO()},
        {"reasoning": Supervised(), "image": GRPO(scale="none")},
    ],
    ids=["apart", "joint", "mixed"],
)
def test_the_gradient_does_not_depend_on_the_rows_of_a_pass(objectives):
    start = parameters(recipe())
    whole, events = after_one_step(objectives=objectives)
    assert not equal(whole, start)
    for num_rows in (1, 2, 3):
        found, same = after_one_step(objectives=objectives, num_rows=num_rows)
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], rtol=0, atol=1e-6)
        metrics, expected = same["update_end"][0]["metrics"], events["update_end"][0]["metrics"]
        assert metrics.keys() == expected.keys()
        torch.testing.assert_close(metrics, expected, rtol=1e-5, atol=1e-6)


def test_the_toy_has_texts_of_all_lengths_and_rows_without_an_image():
    (facts,) = run(recipe(prompts_per_step=4))["rollout_end"]
    lengths = {len(t.segments["reasoning"].actions) for t in facts["trajectories"]}
    assert len(lengths) >= 3
    assert {t.stop for t in facts["trajectories"]} == {Stop.END, Stop.LENGTH}


def test_the_ratio_is_one_and_nothing_is_clipped_at_the_first_update():
    (update,) = run(recipe())["update_end"]
    for stage in ("reasoning", "image"):
        assert update["metrics"][f"{stage}/ratio"].item() == pytest.approx(1, abs=1e-5)
        assert update["metrics"][f"{stage}/clip_frac"] == 0
        assert 0 < update["metrics"][f"{stage}/entropy"] < math.log(VOCABULARY)
    assert update["skipped"] is False


def test_the_gradient_is_the_mean_over_the_actions_of_each_stage():
    asked = recipe(objective=Supervised(), learning_rate=1.0)
    start = parameters(asked)
    (facts,) = run(asked, learner=descending(asked))["rollout_end"]
    fresh = Toy()
    for stage in fresh.stages:
        held = [t.segments[stage] for t in facts["trajectories"] if stage in t.segments]
        nats = []
        for segment in held:
            previous = torch.cat([torch.tensor([VOCABULARY]), segment.actions[:-1]])
            every = fresh.module(stage, previous).log_softmax(-1)
            nats.append(-every[torch.arange(len(previous)), segment.actions][segment.mask])
        (gradient,) = torch.autograd.grad(torch.cat(nats).mean(), getattr(fresh.module, stage))
        moved = start[stage] - parameters(asked)[stage]
        torch.testing.assert_close(moved, gradient, rtol=0, atol=1e-6)


def test_a_long_gradient_is_shortened_to_the_largest_norm():
    asked = recipe(objective=Supervised(), learning_rate=1.0, max_grad_norm=0.01)
    start = parameters(asked)
    (update,) = run(asked, learner=descending(asked))["update_end"]
    assert update["grad_norm"] > 0.01
    moved = torch.cat([(start[k] - p).flatten() for k, p in parameters(asked).items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# ---- Learning --------------------------------------------------------------------------------


def test_the_reward_rises():
    asked = recipe(steps=30, judge=Twos(), learning_rate=0.1, group_size=8)
    means = [sum(v.total() for v in facts["verdicts"]) / len(facts["verdicts"]) for facts in run(asked)["rollout_end"]]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.3


def test_the_same_recipe_gives_the_same_weights():
    first, second, reseeded = recipe(steps=2), recipe(steps=2), recipe(steps=2, seed=1)
    for asked in (first, second, reseeded):
        run(asked)
    assert equal(parameters(first), parameters(second)) == {"reasoning", "image"}
    assert not equal(parameters(first), parameters(reseeded))


@pytest.mark.parametrize("stage", ["reasoning", "image"])
def test_a_stage_nobody_names_is_frozen(stage):
    asked = recipe(steps=2, objectives={stage: GRPO()}, weight_decay=0.1)
    start = parameters(asked)
    events = run(asked)
    assert equal(parameters(asked), start) == {"reasoning", "image"} - {stage}
    metrics = {name.partition("/")[0] for u in events["update_end"] for name in u["metrics"]}
    assert metrics == {stage}


def test_the_rate_of_a_step_is_the_recipes():
    asked = recipe(steps=3, warmup_steps=2, schedule="cosine", learning_rate=0.01)
    rates = []

    def observe(event, **facts):
        if event == "step_end":
            rates.append(facts["learner"].optimizer.param_groups[0]["lr"])

    train(asked, rollouts(asked, asked.prompts), observe=observe)
    assert rates == [asked.rate(step) for step in range(3)]


def test_a_step_without_differences_moves_nothing():
    @frozen
    class Alike(PointwiseJudge):
        def score(self, trajectory):
            return (0.3, 0.1 + 0.2)[trajectory.member[0] % 2]

    asked = recipe(steps=2, judge=Alike())
    start = parameters(asked)
    run(asked)
    assert equal(parameters(asked), start) == {"reasoning", "image"}


def test_unscored_rows_train_nothing():
    @frozen
    class Abstains(PointwiseJudge):
        def score(self, trajectory):
            return None

    asked = recipe(steps=2, judge=Abstains(), max_unscored=1.0, objective=GRPO(kl=1.0))
    start = parameters(asked)
    events = run(asked)
    assert equal(parameters(asked), start) == {"reasoning", "image"}
    assert all(update["metrics"] == {} for update in events["update_end"])


# ---- Several updates -------------------------------------------------------------------------


def repeated(asked, times):
    """The experience of the first step, again and again: its log-probs stay those that drew it."""

    def experience(weights):
        ((_, trajectories, verdicts),) = rollouts(evolve(asked, steps=1), asked.prompts)(weights)
        yield from ((step, trajectories, verdicts) for step in range(times))

    return experience


def test_a_second_update_is_measured_against_the_weights_that_drew():
    asked = recipe(num_updates=2, prompts_per_step=4, learning_rate=0.3)
    first, second = run(asked)["update_end"]
    for stage in ("reasoning", "image"):
        assert first["metrics"][f"{stage}/ratio"].item() == pytest.approx(1, abs=1e-5)
        assert abs(second["metrics"][f"{stage}/ratio"].item() - 1) > 1e-3


def test_two_updates_share_the_prompts_of_a_step():
    asked = recipe(num_updates=2, prompts_per_step=4)
    assert len(run(asked)["update_end"]) == 2
    assert len(run(asked)["step_end"]) == 1
    alone = recipe(num_updates=2, prompts_per_step=1)
    assert len(run(alone)["update_end"]) == 1


def test_actions_drawn_by_older_weights_are_clipped_in_the_end():
    asked = recipe(learning_rate=0.3, objective=GRPO(clip=0.1))
    updates = run(asked, experience=repeated(asked, 4))["update_end"]
    assert updates[0]["metrics"]["image/clip_frac"] == 0
    assert updates[-1]["metrics"]["image/clip_frac"] > 0.1


# ---- Named weights ---------------------------------------------------------------------------


def test_the_reference_stays_the_starting_weights():
    asked = recipe(steps=3, objective=GRPO(kl=0.1))
    start = [p.clone() for p in parameters(asked).values()]
    learner = Learner.of(asked)
    (weights,) = learner.weights.values()
    updates = run(asked, learner=learner)["update_end"]
    assert all(map(torch.equal, weights.copies["reference"], start))
    assert not any(map(torch.equal, weights.live, start))
    assert updates[0]["metrics"]["image/kl"].item() == pytest.approx(0, abs=1e-6)
    assert updates[-1]["metrics"]["image/kl"] > 1e-4


def test_no_reference_is_kept_where_nothing_asks_for_it():
    (weights,) = Learner.of(recipe()).weights.values()
    assert weights.copies == {}


def test_the_kl_pulls_back_to_the_reference():
    def distance(kl):
        asked = recipe(steps=15, judge=Twos(), objective=GRPO(kl=kl), learning_rate=0.1)
        start = log_prob_of_starts(asked)
        run(asked)
        return (start.exp() * (start - log_prob_of_starts(asked))).sum().item()

    assert distance(5.0) < distance(0.0) / 2


def test_the_reference_speaks_with_the_starting_weights():
    asked = recipe(learning_rate=0.3, objective=Shadowed({"reference": lambda step: 1.0}))
    found = run(asked, experience=repeated(asked, 2))["update_end"]
    for stage in ("reasoning", "image"):
        said = [update["metrics"][f"{stage}/reference"] for update in found]
        torch.testing.assert_close(said[0], said[1])


def test_a_copy_without_decay_follows_each_step():
    asked = recipe(steps=2, objective=Shadowed({"old": lambda step: 0.0}))
    learner = Learner.of(asked)
    (weights,) = learner.weights.values()
    follows = []
    train(
        asked,
        rollouts(asked, asked.prompts),
        learner=learner,
        observe=lambda event, **_: follows.append((event, all(map(torch.equal, weights.copies["old"], weights.live)))),
    )
    step = [("rollout_end", True), ("backward_end", True), ("update_end", False), ("step_end", True)]
    assert follows == step * 2


def test_a_copy_moves_towards_the_live_weights_by_its_decay():
    policy = Toy()
    weights = Weights(policy, {"average": lambda step: [0.75, 1.0][step]})
    start = [p.detach().clone() for p in weights.live]
    with torch.no_grad():
        for parameter in weights.live:
            parameter.add_(1)
    for step in (0, 1):
        weights.update(step)
        for copy, before in zip(weights.copies["average"], start, strict=True):
            torch.testing.assert_close(copy, before + 0.25)


def test_named_weights_are_in_place_inside_and_gone_outside_even_after_an_error():
    policy = Toy()
    weights = Weights(policy, {"start": lambda step: 1.0})
    start = parameters(recipe(policy=policy))
    with torch.no_grad():
        for parameter in weights.live:
            parameter.mul_(2)
    moved = parameters(recipe(policy=policy))
    objects = list(policy.module.parameters())

    def body():
        with weights.use("start"):
            assert equal(parameters(recipe(policy=policy)), start) == start.keys()
            assert not torch.is_grad_enabled()
            raise KeyError("in the body")

    with pytest.raises(KeyError, match="in the body"):
        body()
    assert torch.is_grad_enabled()
    assert equal(parameters(recipe(policy=policy)), moved) == moved.keys()
    assert all(map(torch.equal, weights.copies["start"], start.values()))
    assert all(a is b for a, b in zip(objects, policy.module.parameters(), strict=True))


def test_an_objective_may_have_a_mapping_among_its_settings():
    @frozen
    class Weighted(Objective):
        shares: dict

        def advantages(self, rewards):
            return Supervised().advantages(rewards)

        def loss(self, stage, replay, frozen):
            found = Supervised().loss(stage, replay, frozen)
            return Loss(self.shares[stage.name] * found.total)

    asked = recipe(objective=Weighted({"reasoning": 0.0, "image": 1.0}))
    start = parameters(asked)
    run(asked)
    assert equal(parameters(asked), start) == {"reasoning"}


def test_the_state_of_an_objective_is_trained_with_the_weights():
    class Stateful(Objective):
        """Adds (x - 1)^2 an action, so that x moves towards 1."""

        def __init__(self):
            self._module = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(self._module.weight)

        @property
        def module(self):
            return self._module

        def advantages(self, rewards):
            return Supervised().advantages(rewards)

        def loss(self, stage, replay, frozen):
            pull = (self.module.weight - 1).square().sum()
            return Loss(pull * stage.mask.sum() - 0.0 * replay.log_probs[stage.mask].sum())

    objective = Stateful()
    asked = recipe(objective=objective, learning_rate=0.1)
    run(asked, learner=descending(asked))
    assert objective.module.weight.item() == pytest.approx(0.4)  # two stages, 0.2 each


def test_frozen_parameters_have_no_copies():
    policy = Toy()
    policy.module.image.requires_grad_(False)
    weights = Weights(policy, {"start": lambda step: 1.0})
    assert [p is policy.module.reasoning for p in weights.live] == [True]
    assert len(weights.copies["start"]) == 1


def test_a_stage_can_be_sampled_with_named_weights():
    def firsts(**changes):
        objective = Shadowed({"reference": lambda step: 1.0})
        asked = recipe(steps=4, objective=objective, learning_rate=0.5, **changes)
        found = run(asked)["update_end"]
        return [u["metrics"]["image/reference"].item() for u in found]

    live, held = firsts(), firsts(sample_with={"image": "reference"})
    assert live[0] == held[0]
    assert live[-1] != held[-1]


# ---- Failures --------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_skips_the_step_and_says_so():
    objective = Broken(2)  # two stages in the first update
    asked = recipe(steps=2, objective=objective)
    start, seen = parameters(asked), []

    def observe(event, **facts):
        if event == "update_end":
            seen.append((facts["skipped"], bool(torch.isfinite(facts["grad_norm"]))))
            seen.append(len(equal(parameters(asked), start)))

    train(asked, rollouts(asked, asked.prompts), observe=observe)
    assert seen == [(True, False), 2, (False, True), 0]
    assert all(p.isfinite().all() for p in parameters(asked).values())


def test_a_skipped_step_leaves_the_optimizer_as_it_was():
    asked = recipe(objective=Broken(2))
    learner = Learner.of(asked)
    run(asked, learner=learner)
    assert learner.optimizer.state == {}
    assert all(p.grad is None for p in learner.parameters)


def test_no_experience_is_no_step():
    asked = recipe()
    start = parameters(asked)
    events = run(asked, experience=lambda weights: iter(()))
    assert not any(events.values())
    assert equal(parameters(asked), start) == {"reasoning", "image"}
