"""A planner and a diffusion model of the drawn world learn together: plans by tokens, pictures by denoising steps.

    reasonrl train examples/got_r1_diffusion_nano.py
    python examples/got_r1_diffusion_nano.py --train plan        # plan, image, or both (the default)
    python examples/got_r1_diffusion_nano.py --likelihood-free   # DiffusionNFT for the pictures

The planner is the packaged language model, the renderer the packaged flow: a plan's boxes say where things go, and the
flow draws them, not always well. Credit by stage: a plan answers for everything that follows it, by GoT-R1's reward; a
picture answers for its plan alone, by how well it follows it. Both are counted exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

import reasonrl as rl
from reasonrl.interfaces.judge import Sum
from reasonrl.judges import DualStage, ScenePromptImage, SceneReasoningImage
from reasonrl.objectives import GRPO, DenoisingGRPO, DiffusionNFT
from reasonrl.policies import Planner
from reasonrl.renderers import Diffusion
from reasonrl.renderers.steps import ODE, FlowSDE

# Ten steps, the first three random and trained: what goes where is decided early. All pictures of a prompt begin at one
# noise, so that they differ by what is trained. Each plan is drawn four times: pictures are compared with those of
# their own plan, and a plan is rewarded by the mean of its four.
FLOW: dict[str, Any] = {
    "text": "prompt",
    "num_steps": 10,
    "kernel": FlowSDE(eta=0.7),
    "window": "early",
    "window_size": 3,
    "start": "shared",
    "images_per_plan": 4,
    "sample_rows": 96,
}
REWARDS: dict[str, rl.Judge] = {
    "reasoning": DualStage("arxiv-v1").on("reasoning"),
    "image": SceneReasoningImage().named("followed").on("image"),
}
STAGES = {"plan": ("reasoning",), "image": ("image",), "both": ("reasoning", "image")}


def recipe_for(train: str = "both", *, likelihood_free: bool = False, steps: int = 80, seed: int = 0) -> rl.Recipe:
    """Returns the recipe that trains the plan, the image or both."""
    trained = STAGES[train]
    objectives: dict[str | tuple[str, ...], rl.Objective] = {"reasoning": GRPO(clip=0.2), "image": DenoisingGRPO()}
    flow, sample_with = Diffusion("nano", **FLOW), {}
    if likelihood_free:  # any solver draws, and three noised points of each picture are trained on
        flow, sample_with = evolve(flow, kernel=ODE(), start="own"), {"image": "old"}
        objectives["image"] = DiffusionNFT(decay_rate=0.02, decay_most=0.9)
    exact = evolve(flow, kernel=ODE(), window="none", window_size=None, start="own")
    learns = "image" in trained
    return rl.Recipe(
        policy=Planner("nano", max_tokens=80),
        renderer=flow if learns else exact,
        test_renderer=exact,
        judge=sum_of([REWARDS[stage] for stage in trained]),
        objectives={stage: objectives[stage] for stage in trained},
        sample_with=sample_with if learns else {},
        prompts="scenes/train",
        prompts_per_step=4,
        group_size=6,
        group_by="parent",
        num_rows=48,
        steps=steps,
        learning_rate=1e-4,
        average=0.9,
        seed=seed,
        tests={name: f"scenes/{name}" for name in ("test", "held_out")},
        test_judge=ScenePromptImage(),
    )


def sum_of(judges: Sequence[rl.Judge]) -> rl.Judge:
    return judges[0] if len(judges) == 1 else Sum(tuple(judges))


recipe = recipe_for()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=STAGES, default="both")
    parser.add_argument("--likelihood-free", action="store_true", help="DiffusionNFT instead of GRPO for the pictures")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/got_r1_diffusion_nano"))
    asked = parser.parse_args()
    found = recipe_for(asked.train, likelihood_free=asked.likelihood_free, steps=asked.steps, seed=asked.seed)
    print(rl.run(found, asked.out))


if __name__ == "__main__":
    main()
