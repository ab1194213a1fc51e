"""An adapter of no pipeline: a small network over 4x4 latents, and a policy that says given plans."""

from types import SimpleNamespace

import torch
from attrs import frozen
from PIL import Image
from torch import nn

from reasonrl import Prompt, Segment, Trajectory
from reasonrl.interfaces import Policy
from reasonrl.noise import Draw
from reasonrl.renderers.family import Family, alpha_bar_schedule, flow_schedule
from reasonrl.testing import PLAN

SHAPE = (2, 4, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(37, 48), nn.Linear(48, 32)
        self.rows_at_once = []

    @property
    def dtype(self):
        return self.inner.weight.dtype

    def forward(self, x, time, words):
        self.rows_at_once.append(len(x))
        seen = torch.cat([x.flatten(1), time[:, None].to(x), words], 1)
        found = self.outer(torch.tanh(self.inner(seen))).reshape(x.shape)
        poison = torch.where(words[:, :1] > 1e3, torch.nan, 0.0)
        return found + poison[..., None, None].to(x)


class Toy(Family):
    """Words are four numbers that the text gives; a text with "poison" makes the network say NaN."""

    def __init__(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        super().__init__(SimpleNamespace(transformer=Net(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)))
        self.pipe.components = {"transformer": self.pipe.transformer}

    @property
    def size(self):
        return (8, 8)

    def latent_shape(self, size):
        return SHAPE

    def encode(self, briefs, size):
        return [{"words": words(brief.text)} for brief in briefs]

    def schedule(self, num_steps, size):
        return flow_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x, inputs, conditions):
        return self.denoiser(x, inputs, conditions["words"])

    def decode(self, latents):
        grey = (latents.float().mean(1).clamp(-2, 2) * 60 + 128).to(torch.uint8)
        return [Image.fromarray(one.numpy()).resize((8, 8)).convert("RGB") for one in grey.cpu()]


class ToyVariancePreserving(Toy):
    flow = False

    def __init__(self):
        from diffusers import DDIMScheduler

        super().__init__()
        self.pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)

    def schedule(self, num_steps, size):
        return alpha_bar_schedule(self.pipe.scheduler, num_steps)

    def predict(self, x, inputs, conditions):
        # About data N(0, 1), of which E[ε | x] = √(1 − A) x: latents keep their scale.
        noise = (1 - self.pipe.scheduler.alphas_cumprod[inputs.long()]).sqrt().reshape(-1, 1, 1, 1)
        return noise * x + self.denoiser(x, inputs / 1000, conditions["words"])


class Loaded:
    """In the place of a `pipelines.Loader`."""

    def __init__(self, family):
        self.family = family

    def load(self, *asked):
        return self.family


def words(text):
    if "poison" in text:
        return torch.full((4,), 1e4)
    generator = torch.Generator().manual_seed(sum(text.encode()))
    return torch.randn(4, generator=generator) * bool(text)


@frozen
class Plans(Policy):
    """Says one plan for every member, or a member's own; nothing of it is trained."""

    texts: tuple[str, ...] = (PLAN,)
    stages = ("reasoning",)
    offers = {"reasoning": frozenset()}  # noqa: RUF012 - a property of the interface

    @property
    def module(self):
        return nn.Identity()

    def sample(self, prompts, *, group_size, draw):
        return [
            Trajectory(p, (g,), texts={"reasoning": self.texts[g % len(self.texts)]})
            for p in prompts
            for g in range(group_size)
        ]

    def replay(self, batch, needs):
        return {}

    def save(self, folder):
        pass


def given(*texts, prompts=("a dog", "two cats"), members=2):
    """Returns trajectories of these prompts, `members` each, whose plans these are in turn."""
    policy = Plans(texts or (PLAN,))
    return policy.sample([Prompt(p, p) for p in prompts], group_size=members, draw=Draw(0, 0))


def one_segment(trajectory, stage="image") -> Segment:
    return trajectory.segments[stage]
