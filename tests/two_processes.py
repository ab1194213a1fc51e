"""What test_distributed.py runs in two processes, and in one: python -m tests.two_processes FOLDER CASE ..."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import JanusForConditionalGeneration

from reasonrl import Judge, PointwiseJudge, Recipe, Score, Trajectory, hooks
from reasonrl.distributed import Solo, World, launched
from reasonrl.errors import ReasonRLError
from reasonrl.loop import Learner, train
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens
from reasonrl.rollout import rollouts
from reasonrl.scenes import nano
from reasonrl.session import Interrupted, run
from reasonrl.sharding import full

STEPS = 3
PROMPTS = (
    "a red circle left of a blue square",
    "a yellow diamond underneath a blue cross and a green square",
    "two green circles",
)


@frozen
class Wordy(PointwiseJudge):
    """The letters of the reasoning: an untrained policy's rewards differ within a group."""

    def score(self, trajectory: Trajectory) -> float:
        return len(trajectory.reasoning or "") / 100


@frozen
class Shy(PointwiseJudge):
    """Wordy, but silent about the last prompt."""

    def score(self, trajectory: Trajectory) -> float | Score:
        return Score(None, "shy") if trajectory.prompt.text == PROMPTS[2] else Wordy().score(trajectory)


class Failing(PointwiseJudge):
    """Wordy, until the second process has a second step judged."""

    def __init__(self, rank: int) -> None:
        self.rank, self.left = rank, 2  # members of a group

    def score(self, trajectory: Trajectory) -> float:
        self.left -= 1
        if self.rank == 1 and self.left < 0:
            raise RuntimeError("out of credit")
        return Wordy().score(trajectory)


# ---- learning ----


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {"steps": STEPS},
    "updates": {"num_updates": 2},
    "idle": {"prompts_per_step": 1},
    "shy": {"judge": Wordy().on("reasoning") + Shy().on("image")},
    "lora": {"policy": {"lora_rank": 4}},
    "heads": {"policy": {"trained": ("heads",)}},
    "parts": {"overlap": 2},
    "recomputed": {"policy": {"gradient_checkpointing": True}},
}
"""What each case changes in the recipe that all of them share."""


def build(folder: Path) -> None:
    """Writes the packaged model's like, untrained, and a smaller one: two layers, 16 image tokens, no pictures."""
    nano.build(folder / "nano")
    tokenizer = nano.build_tokenizer()
    config = nano.build_config(tokenizer)
    config.text_config.num_hidden_layers, config.vision_config.num_image_tokens = 2, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        JanusForConditionalGeneration(config).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    (folder / "three.txt").write_text("".join(f"{line}\n" for line in PROMPTS))


def recipe(folder: Path, *, policy: dict[str, Any] | None = None, judge: Judge | None = None, **changes: Any) -> Recipe:
    """Three prompts a step, so 2 + 1; two rows a pass, so 2 + 1 passes."""
    settings = {
        "prompts": str(folder / "three.txt"),
        "objective": GRPO(kl=0.1),
        "steps": 2,  # the reference is away from the learner in the second
        "prompts_per_step": 3,
        "group_size": 2,
        "num_rows": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
    }
    return Recipe(
        policy=GoTR1(str(folder / "small"), guidance=3.0, max_tokens=12, **(policy or {})),
        judge=judge or Wordy(),
        **{**settings, **changes},
    )


def learned(asked: Recipe, world: World) -> dict[str, Any]:
    """Trains, and returns each update's norm and metrics, and the weights at the end, whole."""
    lines: list[dict[str, float]] = []

    def observe(event: str, **facts: Any) -> None:
        if event == "update_end":
            norm = {"grad_norm": float(facts["grad_norm"])}
            lines.append(norm | {name: float(value) for name, value in facts["metrics"].items()})

    learner = Learner.of(asked, world)
    for group in learner.optimizer.param_groups:
        group["eps"] = 1e-3  # at 1e-8 AdamW steps by the sign of a gradient, also of one that is float noise
    train(asked, rollouts(asked, asked.read(), world=world), learner=learner, world=world, observe=observe)
    return {"lines": lines, "weights": weights_of(asked)}


def weights_of(asked: Recipe) -> dict[str, Tensor]:
    named = [(n, p) for n, p in asked.policy.module.named_parameters() if p.requires_grad]
    return {name: full(parameter.detach()).clone() for name, parameter in named}


def case(folder: Path, name: str, world: World) -> dict[str, Any]:
    """Runs "plain", "lora/sharded", ..."""
    which, _, kind = name.partition("/")
    return learned(recipe(folder, sharded=kind == "sharded", **CHANGES[which]), world)


# ---- collectives ----


def collectives(folder: Path, world: World) -> dict[str, Any]:
    rank = world.rank
    found: dict[str, Any] = {
        "sum": world.sum(torch.tensor([rank + 1, 10])),
        "max": world.max(5 - rank),
        "gather": world.gather([rank, str(rank)][: 2 - rank]),
    }
    # One has a gradient here, one there, one nowhere; two dtypes.
    here, there, nowhere, half = (nn.Parameter(torch.zeros(3)) for _ in range(4))
    half.data = half.data.bfloat16()
    (there if rank else here).grad = torch.full((3,), rank + 1.0)
    half.grad = torch.full((3,), 2.0, dtype=torch.bfloat16)
    parameters = [here, there, nowhere, half]
    world.sum_gradients(parameters)
    found["gradients"] = [None if p.grad is None else p.grad.float().clone() for p in parameters]
    found["norm"] = world.clip_gradients(parameters[:2], 1.0)
    found["clipped"] = torch.cat([p.grad for p in parameters[:2] if p.grad is not None]).norm()
    found["norm of nothing"] = world.clip_gradients([nowhere], 1.0)
    found["said"] = refusal(world)
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, rank + 1.0)
    world.place(module, sharded=False)
    found["placed"] = module.weight.detach().clone()
    return found


def refusal(world: World) -> str:
    """What every process hears when the second fails."""
    try:
        with world.agreed():
            if world.rank == 1:
                raise ValueError("no such file")
    except ReasonRLError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---- sharding ----


class Forked(nn.Module):
    """Two blocks, and two heads of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
            self.heads = nn.ParameterDict({name: nn.Parameter(torch.randn(5)) for name in "abc"})

    def forward(self, value: Tensor, head: str) -> Tensor:
        for block in self.blocks:
            value = torch.tanh(block(value))
        return (value @ self.heads[head]).sum()


def forked(folder: Path, world: World) -> dict[str, Any]:
    """Rank 0 uses head a, rank 1 head b, nobody c."""
    module = Forked()
    inputs = torch.linspace(-1, 1, 10).reshape(2, 1, 5)
    if world.size > 1:
        world.place(module, sharded=True)
        with torch.no_grad():
            module(inputs[0], "a")
        root = module.heads["a"]
        found = {"root stays split": isinstance(root, DTensor)}
        with world.whole([Held(module)]):
            whole = dict(module.named_parameters())
            found["whole inside"] = not any(isinstance(p, DTensor) for p in module.state_dict().values())
            for _ in range(world.rank):  # as often as this rank likes
                module(inputs[0], "a")
        found["the same objects after"] = root is module.heads["a"] and all(
            p is not whole[name] for name, p in module.named_parameters()
        )
        module(inputs[world.rank], "ab"[world.rank]).backward()
    else:
        found = {}
        (module(inputs[0], "a") + module(inputs[1], "b")).backward()
    gradients = {n: None if p.grad is None else full(p.grad) for n, p in module.named_parameters()}
    norm = world.clip_gradients(list(module.parameters()), 1e9)
    return {**found, "gradients": gradients, "norm": norm}


class Held:
    """As much of a trainable as `whole` asks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def in_float32(layer: nn.Linear, value: Tensor) -> Tensor:
    return nn.functional.linear(value, layer.weight.float(), layer.bias)


def mixed(folder: Path, world: World) -> dict[str, Any]:
    """A block with frozen bfloat16 and trained float32 is split; two trained dtypes are refused in one line."""
    module = Forked()
    module.blocks[0].bfloat16().requires_grad_(False)
    module.blocks[0].bias = nn.Parameter(torch.ones(5))
    module.blocks[1].weight = nn.Parameter(module.blocks[1].weight.bfloat16())
    try:
        world.place(module, sharded=True)
        said = "nothing"
    except ReasonRLError as error:
        said = str(error)
    module = Forked()
    module.blocks[0].weight = nn.Parameter(module.blocks[0].weight.bfloat16(), requires_grad=False)
    module.blocks[0].forward = types.MethodType(in_float32, module.blocks[0])
    world.place(module, sharded=True)
    module(torch.ones(1, 5), "a").backward()
    return {"said": said, "gradient": full(module.blocks[0].bias.grad)}


# ---- runs ----


@contextmanager
def watching(observer: object) -> Iterator[None]:
    hooks.manager().register(observer)
    try:
        yield
    finally:
        hooks.manager().unregister(observer)


class CtrlC:
    """Presses Ctrl-C in one process alone, during a step."""

    @hooks.hookimpl
    def rollout_end(self, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def whole_run(folder: Path, **changes: Any) -> Recipe:
    """A recipe with pictures and test prompts."""
    asked = recipe(folder, tests={"test": str(folder / "three.txt")}, steps=STEPS, save_every=100, **changes)
    return evolve(asked, policy=GoTR1(str(folder / "nano"), guidance=3.0, max_tokens=12), renderer=Tokens())


def stopped(folder: Path, world: World) -> dict[str, Any]:
    """A split run that Ctrl-C in the first process stops after its second step; both name a folder of their own."""
    try:
        with watching(CtrlC()):
            run(whole_run(folder, sharded=True), folder / f"stopped-{world.rank}", quiet=True)
    except Interrupted as error:
        return {"said": str(error)}
    return {"said": "nothing"}


def resumed(folder: Path, world: World) -> dict[str, Any]:
    """Goes on with a copy of it."""
    if world.rank == 0:
        shutil.copytree(folder / "stopped-0", folder / "resumed")
    world.gather([])
    return {"page": str(run(whole_run(folder, sharded=True), folder / "resumed", resume=True, quiet=True))}


def failed(folder: Path, world: World) -> dict[str, Any]:
    """A judge that fails in the second process, at the second step."""
    try:
        run(recipe(folder, judge=Failing(world.rank), sharded=True, save_every=100), folder / "failed", quiet=True)
    except ReasonRLError as error:
        return {"said": f"{type(error).__name__}: {error}"}
    return {"said": "nothing"}


def blind(folder: Path, world: World) -> dict[str, Any]:
    """Of all trajectories a third is unscored, though of the second process's it is all."""
    said = []
    for most in (0.5, 0.3):
        asked = recipe(folder, judge=Shy(), steps=1, max_unscored=most)
        try:
            train(asked, rollouts(asked, asked.read(), world=world), world=world)
        except ReasonRLError as error:
            said.append(f"{type(error).__name__}: {error}")
    return {"said": said}


ANSWERS: dict[str, Callable[[Path, World], dict[str, Any]]] = {
    "collectives": collectives,
    "forked": forked,
    "mixed": mixed,
    "stopped": stopped,
    "resumed": resumed,
    "failed": failed,
    "blind": blind,
}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    world = launched()
    assert not isinstance(world, Solo)
    for name in names:
        found = ANSWERS[name](folder, world) if name in ANSWERS else case(folder, name, world)
        torch.save(found, folder / f"{name.replace('/', '-')}-{world.size}-{world.rank}.pt")
    world.gather([])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
