"""A policy that nothing trains and a renderer that learns one gray: runs of a renderer alone, in milliseconds."""

import math

import torch
from attrs import evolve, field, frozen, validators
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from reasonrl.interfaces import PointwiseJudge, Policy, Renderer, Trainable
from reasonrl.noise import normal
from reasonrl.objectives import GRPO
from reasonrl.recipe import Recipe
from reasonrl.types import Prompt, Replay, Segment, Trajectory

NOISE = 0.1
START = 0.3
PROMPTS = tuple(Prompt(name, f"draw {name}") for name in "ab")


class Quiet(Policy):
    """Says one sentence; draws no stage."""

    stages = ()
    offers = {}  # noqa: RUF012 - a property of the interface

    def __init__(self):
        self._module = nn.Linear(1, 1)

    @property
    def module(self):
        return self._module

    def sample(self, prompts, *, group_size, draw):
        return [Trajectory(p, (g,), texts={"reasoning": "a gray"}) for p in prompts for g in range(group_size)]

    def replay(self, batch, needs):
        raise NotImplementedError

    def save(self, folder):
        (folder / "policy.txt").write_text("quiet")


class Paint(nn.Module):
    """One number: the gray that is painted with."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(START))


@frozen
class Gray(Renderer, Trainable):
    """Draws `num_strokes` grays around what was learnt, and their mean as a picture."""

    num_strokes: int = field(default=1, validator=validators.ge(1))
    size: int = 8
    stage: str = "image"
    _paint: Paint = field(factory=Paint, eq=False, repr=False)
    _replays: list = field(factory=list, eq=False, repr=False)

    @property
    def stages(self):
        return (self.stage,)

    @property
    def offers(self):
        return {self.stage: frozenset({"log_probs", "entropy"})}

    @property
    def module(self):
        return self._paint

    @torch.no_grad()
    def render(self, trajectories, *, draw):
        return [self._drawn(t, draw) for t in trajectories]

    def _drawn(self, trajectory, draw):
        (z,) = normal([draw.key(trajectory.prompt.id, trajectory.member, self.stage)], self.num_strokes, 1)
        strokes = self._paint.level + NOISE * z
        gray = Image.new("F", (self.size, self.size), 255 * float(strokes.mean())).convert("RGB")
        mask = torch.ones(self.num_strokes, dtype=torch.bool)
        segment = Segment(
            self.stage, trajectory.member, strokes, mask, self._log_probs(strokes), {"level": strokes - NOISE * z}
        )
        return evolve(
            trajectory,
            images={**trajectory.images, self.stage: gray},
            segments={**trajectory.segments, self.stage: segment},
        )

    def _log_probs(self, strokes):
        return torch.distributions.Normal(self._paint.level, NOISE).log_prob(strokes).sum(-1)

    def replay(self, batch, needs):
        self._replays.append(set(needs))
        stage = batch.stages[self.stage]
        entropy = torch.full_like(stage.advantages[:, None].expand(stage.mask.shape), math.log(NOISE))
        return {self.stage: Replay(self._log_probs(stage.actions), entropy)}

    def save(self, folder):
        save_file({"level": self._paint.level.detach().reshape(1)}, folder / "paint.safetensors")


@frozen
class Brightness(PointwiseJudge):
    """How bright the picture is, in [0, 1]."""

    needs = frozenset({"image"})

    def score(self, trajectory):
        return trajectory.image.convert("L").getpixel((0, 0)) / 255


def recipe(**changes):
    given = {} if "objectives" in changes else {"objective": GRPO()}
    default = {
        "policy": Quiet(),
        "renderer": Gray(),
        "judge": Brightness(),
        "prompts": PROMPTS,
        "steps": 4,
        "prompts_per_step": 2,
        "group_size": 4,
        "learning_rate": 0.02,
    }
    return Recipe(**{**default, **given, **changes})


def levels(trajectories):
    """The gray that each was painted with."""
    return [t.segments["image"].context["level"].mean().item() for t in trajectories]
