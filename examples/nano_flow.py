"""Makes the packaged nano flow: a small diffusion model of the drawn world, trained from scratch on one core.

    make nano-flow

Every picture follows the plan beside it, box by box, also where the plan contradicts the prompt; now and then the plan,
the prompt or both are left out. It prints the loss, and how many pictures of test prompts are exactly right.
With --faulty the teacher errs: in so many pictures an object has another colour or shape than planned, or is missing.
Then the model draws well, and not always what was planned: that is what RL can mend.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import evolve, frozen
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from reasonrl.plan import Box, Plan, PlannedObject
from reasonrl.renderers.families.drawn_world import DrawnWorld
from reasonrl.renderers.family import Brief
from reasonrl.renderers.steps import ODE, step
from reasonrl.scenes import codec, compose, flow, grammar, parser, splits, truth, world

BATCH = 64
NO_PLAN, NO_TEXT, NOTHING = 0.15, 0.10, 0.05
"""Fractions of the examples."""
JITTER = 45
"""How far a planned edge may be from the grid, in a fifth of the plans: less than half a cell."""


@frozen
class Example:
    """A picture, and a plan that describes it whatever the text says."""

    text: str
    objects: tuple[PlannedObject, ...]
    tokens: np.ndarray


class Examples:
    """Half are the teacher's; of the others, some have the prompt's objects anywhere, some any objects at all."""

    def __init__(self, seed: int, faulty: float = 0.0) -> None:
        self.faulty = faulty
        self.prompts = splits.stream("train", seed=seed + 1)
        self.rng = np.random.default_rng([seed, 6])

    def __call__(self) -> Example:
        rng, prompt = self.rng, next(self.prompts)
        kind = rng.random()
        if kind < 0.5:
            shown = compose.demonstration(prompt, rng, compose.Faults(corrupted_tokens=0))
            return self.blur(Example(prompt, Plan.parse(shown.plan_text).objects, self.drawn(scene_of(shown.tokens))))
        request = grammar.parse_prompt(prompt)
        if kind < 0.8:
            request = evolve(request, relations=())
        else:
            num = int(rng.integers(1, world.MOST_OBJECTS + 1))
            request = grammar.Request(tuple(self.anything() for _ in range(num)))
        scene = compose.place(request, rng)
        objects = tuple(PlannedObject(item.name, item.box) for item in scene.objects)
        return self.blur(Example(prompt, objects, self.drawn(scene)))

    def drawn(self, scene: world.Scene) -> np.ndarray:
        """Returns the tokens of a scene as the teacher draws it."""
        wrong = self.rng.random() < self.faulty
        return codec.encode(world.draw(self.mistaken(scene) if wrong else scene))

    def mistaken(self, scene: world.Scene) -> world.Scene:
        """Returns a scene in which one object has another colour or shape, or is missing."""
        rng, objects = self.rng, list(scene.objects)
        i, kind = int(rng.integers(len(objects))), rng.random()
        if kind < 0.5:
            objects[i] = evolve(objects[i], color=str(rng.choice([c for c in world.COLORS if c != objects[i].color])))
        elif kind < 0.75 or len(objects) == 1:
            objects[i] = evolve(objects[i], shape=str(rng.choice([s for s in world.SHAPES if s != objects[i].shape])))
        else:
            del objects[i]
        return world.Scene(tuple(objects))

    def anything(self) -> grammar.Wanted:
        texture = str(self.rng.choice(world.TEXTURES)) if self.rng.random() < 0.6 else world.SOLID
        return grammar.Wanted(str(self.rng.choice(world.SHAPES)), str(self.rng.choice(list(world.COLORS))), texture)

    def blur(self, example: Example) -> Example:
        """Leaves out plan or text, moves edges off the grid, and puts the plan in any order."""
        rng, chance = self.rng, self.rng.random()
        objects = [example.objects[i] for i in rng.permutation(len(example.objects))]
        if rng.random() < 0.2:
            objects = [self.shifted(item) for item in objects]
        no_plan = chance < NO_PLAN or chance >= 1 - NOTHING
        no_text = NO_PLAN <= chance < NO_PLAN + NO_TEXT or chance >= 1 - NOTHING
        return Example("" if no_text else example.text, () if no_plan else tuple(objects), example.tokens)

    def shifted(self, item: PlannedObject) -> PlannedObject:
        assert item.box is not None
        edges = (item.box.x0, item.box.y0, item.box.x1, item.box.y1)
        moved = np.clip(np.array(edges) + self.rng.integers(-JITTER, JITTER + 1, 4), 0, 1000)
        return PlannedObject(item.name, Box(*moved.tolist()))


def scene_of(tokens: np.ndarray) -> world.Scene:
    """Returns what the teacher's tokens show."""
    seen = parser.read_image(codec.decode(tokens)).objects
    return world.Scene(tuple(world.SceneObject(o.shape, o.color, o.texture, o.box) for o in seen))


def correct_briefs(split: str, num: int, seed: int = 0) -> list[Brief]:
    """Returns prompts of a split with a plan that keeps each of them."""
    rng = np.random.default_rng(seed)
    shown = [compose.demonstration(text, rng, compose.NO_FAULTS) for text in splits.load(split)[:num]]
    return [Brief(d.prompt, Plan.parse(d.plan_text).objects) for d in shown]


@torch.no_grad()
def draw(family: DrawnWorld, briefs: Sequence[Brief], *, num_steps: int = 10, seed: int = 0) -> list[Image.Image]:
    """Returns a picture of each brief, by Euler steps without guidance."""
    conditions = family.collate(family.encode(briefs, family.size))
    schedule = family.schedule(num_steps, family.size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(briefs), *family.latent_shape(family.size), generator=generator)
    for i in range(num_steps):
        v = family.predict(x, schedule.inputs[i].expand(len(x)), conditions)
        x = step(ODE(), x, v, float(schedule.times[i]), float(schedule.times[i + 1])).next
    return family.decode(x)


def exact_frac(family: DrawnWorld, briefs: Sequence[Brief]) -> float:
    """Returns the fraction of pictures that show exactly what their prompt asks for."""
    pictures = draw(family, briefs)
    return float(
        np.mean(
            [
                truth.exact(grammar.parse_prompt(brief.text), parser.read_image(picture))
                for brief, picture in zip(briefs, pictures, strict=True)
            ]
        )
    )


def batches(examples: Callable[[], Example], model: flow.NanoFlow) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yields latents and what the conditioner takes."""
    while True:
        shown = [examples() for _ in range(BATCH)]
        tokens = torch.from_numpy(np.stack([one.tokens for one in shown]))
        read = model.conditioner.read([one.text for one in shown], [one.objects for one in shown])
        yield model.latents.of_tokens(tokens), read


def loss_of(model: flow.NanoFlow, x0: Tensor, read: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Returns the squared error of the velocity times s, at stratified times; cells with something count thrice."""
    family = DrawnWorld(model)
    s = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    noise = torch.randn(x0.shape, generator=generator)
    mixed = torch.lerp(x0, noise, s.reshape(-1, 1, 1, 1))
    error = family.predict(mixed, s, model.conditioner(*read)) - (noise - x0)
    plain = model.latents.codes()[codec.PLAIN].reshape(1, -1, 1, 1)
    weight = 1 + 2 * (x0 != plain).any(1, keepdim=True).float()
    weight = weight * s.clamp(min=flow.LEAST_TIME).reshape(-1, 1, 1, 1)
    return (weight * error.square()).mean() / weight.mean()


def main() -> None:
    parser_ = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser_.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser_.add_argument("--steps", type=int, default=1000)
    parser_.add_argument("--learning-rate", type=float, default=2e-3)
    parser_.add_argument("--seed", type=int, default=0)
    parser_.add_argument("--start", help="go on from this checkpoint instead of an untrained one")
    parser_.add_argument("--faulty", type=float, default=0.0, help="share of pictures that are not as planned")
    parser_.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    asked = parser_.parse_args()
    torch.set_num_threads(1)
    model = flow.load(asked.start) if asked.start else flow.build(seed=asked.seed)
    model.transformer.train()
    model.conditioner.train()
    weights = [*model.transformer.parameters(), *model.conditioner.parameters()]
    optimizer = torch.optim.AdamW(weights, asked.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(asked.seed)
    briefs = correct_briefs("test", 64)
    began, losses = time.perf_counter(), []
    shown = batches(Examples(asked.seed, asked.faulty), model)
    for number in range(1, asked.steps + 1):
        fall = 0.5 * (1 + math.cos(math.pi * number / asked.steps))
        optimizer.param_groups[0]["lr"] = asked.learning_rate * min(number / 100, fall)
        loss = loss_of(model, *next(shown), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number % 50 == 0:
            print(f"step {number}  loss {np.mean(losses[-50:]):.4f}  {time.perf_counter() - began:.0f} s", flush=True)
        if number % asked.every == 0 or number == asked.steps:
            model.save_pretrained(asked.out)
            halve(asked.out)
            family = DrawnWorld(flow.load(asked.out))
            print(f"step {number}  exact {exact_frac(family, briefs):.3f} of {len(briefs)} with plans", flush=True)


def halve(folder: Path) -> None:
    """Stores trained weights in bfloat16: half the size, and the loader widens them again."""
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name != "latents":
            save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
