"""A flow over the plane that draws one of two modes, and noised stages to try formulas on."""

import copy
import functools
import math

import torch
from attrs import frozen
from torch import nn

from reasonrl.batch import passes, trained_mask
from reasonrl.credit import credit
from reasonrl.interfaces import PointwiseJudge, Policy
from reasonrl.loop import Learner, pass_loss, train
from reasonrl.noise import Draw, normal
from reasonrl.recipe import Recipe
from reasonrl.rollout import rollouts
from reasonrl.types import Prompt, Replay, Score, Segment, Stage, Trajectory

STAGE = "point"
PROMPTS = tuple(Prompt(name, f"draw {name}") for name in ("a", "b", "c", "long"))
MODES, SPREAD = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3


class Field(nn.Module):
    """A velocity of (K, 2) points at (K,) times."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x, t):
        angle = 2 * math.pi * t[:, None]
        return self.layers(torch.cat([x, t[:, None], angle.sin(), angle.cos(), t[:, None].square()], 1))


@functools.cache
def _pretrained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = Field()
        optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
        for _ in range(500):
            clean = MODES[torch.randint(2, (256,))] + SPREAD * torch.randn(256, 2)
            noise, t = torch.randn(256, 2), torch.rand(256)
            found = field((1 - t[:, None]) * clean + t[:, None] * noise, t)
            optimizer.zero_grad()
            (found - (noise - clean)).square().mean().backward()
            optimizer.step()
    return field


class Points(Policy):
    """Draws a point by Euler's method; its actions are the path's last points, one more for the prompt "long"."""

    stages = (STAGE,)
    offers = {STAGE: frozenset({"velocity"})}  # noqa: RUF012 - a property of the interface
    provides = frozenset({"point"})
    factorised = True

    def __init__(self, *, dtype=torch.float32, num_points=3, num_steps=8):
        self._module = copy.deepcopy(_pretrained()).to(dtype)
        self.dtype, self.num_points, self.num_steps = dtype, num_points, num_steps
        self.replayed = []

    @property
    def module(self):
        return self._module

    @torch.no_grad()
    def sample(self, prompts, *, group_size, draw):
        rows = [(p, (g,)) for p in prompts for g in range(group_size)]
        x = normal([draw.key(p.id, m, STAGE) for p, m in rows], 2).to(self.dtype)
        path = []
        for k in range(self.num_steps, 0, -1):
            path.append(x)
            x = x - self.module(x, torch.full((len(x),), k / self.num_steps, dtype=self.dtype)) / self.num_steps
        path = torch.stack(path, 1)
        return [self._one(*row, path[i], x[i], draw) for i, row in enumerate(rows)]

    def _one(self, prompt, member, path, clean, draw):
        length = self.num_points + (prompt.id == "long")
        address = torch.tensor(draw.key("", (), STAGE))
        mask = torch.ones(length, dtype=torch.bool)
        segment = Segment(STAGE, member, path[-length:], mask, context={"clean": clean, "address": address})
        return Trajectory(prompt, member, {STAGE: segment}, artifacts={"point": tuple(clean.tolist())})

    def replay(self, batch, needs):
        assert needs == {STAGE: {"velocity"}}
        stage = batch.stages[STAGE]
        noised, times = stage.context["noised"], stage.context["times"]
        self.replayed.append((noised, times))
        found = self.module(noised[stage.mask], times[stage.mask])
        nothing = torch.full_like(noised, torch.nan)  # whoever reads what is not trained gets it
        return {STAGE: Replay(extras={"velocity": nothing.index_put(stage.mask.nonzero(as_tuple=True), found)})}

    def save(self, folder):
        raise NotImplementedError


@frozen
class Rightmost(PointwiseJudge):
    """How far right the point lies, in (0, 1); the members named are left unscored."""

    unscored: frozenset[int] = frozenset()

    def score(self, trajectory):
        if trajectory.member[-1] in self.unscored:
            return Score(None, "unread")
        return 1 / (1 + math.exp(-trajectory.artifacts["point"][0]))


def recipe(objective, **changes):
    default = {
        "policy": Points(),
        "judge": Rightmost(),
        "prompts": PROMPTS,
        "objective": objective,
        "steps": 40,
        "prompts_per_step": 4,
        "group_size": 16,
        "learning_rate": 2e-3,
    }
    return Recipe(**{**default, **changes})


def share_on_the_right(policy):
    """The fraction of 512 points, all from noise of one seed, that the preferred mode gets."""
    drawn = policy.sample([Prompt(str(i), "") for i in range(8)], group_size=64, draw=Draw(7, 0))
    return sum(t.artifacts["point"][0] > 0 for t in drawn) / len(drawn)


def learned(objective, **changes):
    """Trains by the real loop; returns the preferred mode's share before and after."""
    asked = recipe(objective, **changes)
    before = share_on_the_right(asked.policy)
    train(asked, rollouts(asked, asked.prompts))
    return before, share_on_the_right(asked.policy)


def rows_of(asked, *, spoil=lambda trajectory: trajectory):
    """Returns the credited rows of the recipe's first step."""
    learner = Learner.of(asked)
    ((_, trajectories, verdicts),) = rollouts(asked, asked.prompts)(learner.weights)
    return credit([spoil(t) for t in trajectories], verdicts, asked, gather=list)


def gradient(asked, rows, *, parts=(slice(None),), num_rows=None, num_actions=None, moved=0.0):
    """Returns the step's gradient over these parts of the rows, each in passes of its own, as the loop adds it."""
    learner = Learner.of(asked)
    ((trainable, weights),) = learner.weights.items()
    started = copy.deepcopy(trainable.module.state_dict())
    with torch.no_grad():  # away from its named copies
        for p in weights.live:
            p += moved * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)
    counts = {c: o.count(trained_mask(rows, c)) for c, o in asked.claims.items()}
    whole = any(o.whole_groups for o in asked.claims.values())
    for part in parts:
        how = {"num_rows": num_rows, "num_actions": num_actions, "whole_groups": whole}
        for share, batch in passes(rows[part], trainable, **how):
            loss, _ = pass_loss(asked.claims, trainable, batch, weights, counts)
            (share * loss).backward()
    found = torch.cat([p.grad.flatten() for p in weights.live])
    learner.optimizer.zero_grad()
    trainable.module.load_state_dict(started)
    return found


def stage(mask, *, shape=(2,), advantages=None, groups=None, seed=0, step=0):
    """Returns a stage of random clean latents in float64, not yet prepared."""
    num, length = mask.shape
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(num, *shape, generator=generator, dtype=torch.float64)
    return Stage(
        STAGE,
        tuple(("p", (i,)) for i in range(num)),
        actions=torch.zeros(num, length, *shape, dtype=torch.float64),
        present=torch.ones_like(mask),
        mask=mask,
        advantages=torch.randn(num, generator=generator, dtype=torch.float64) if advantages is None else advantages,
        groups=torch.zeros(num, dtype=torch.long) if groups is None else groups,
        context={"clean": list(clean), "address": [torch.tensor(Draw(3, step).key("", (), STAGE))] * num},
    )


def velocities(prepared, number, *, seed=0):
    """Returns so many random velocities of a prepared stage; each asks for its gradient."""
    generator = torch.Generator().manual_seed(100 + seed)
    shape = prepared.context["noised"].shape
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(number)]


def saying(velocity):
    return Replay(extras={"velocity": velocity})


def assert_same(found, expected, wanted):
    """Asserts that two losses are equal to 1e-10, and so are their gradients in one tensor."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    one, other = (torch.autograd.grad(value, wanted)[0] for value in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
