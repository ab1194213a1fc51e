"""The published ways to train a diffusion model by rewards, as fields: each a renderer and an objective.

python examples/denoising_recipes.py --out runs/denoising                    # all of them on the drawn world
python examples/denoising_recipes.py --out runs/denoising --only flow-grpo diffusion-nft
python examples/denoising_recipes.py --list

What a paper does not say of its recipe is left as it is here. Steps, groups and rates are made for the drawn world:
the papers' own are in docs/which-renderer.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

import reasonrl as rl
from reasonrl.judges import DualStage, ScenePromptImage
from reasonrl.objectives import AdvantageWeighted, DenoisingGRPO, DiffusionDPO, DiffusionNFT
from reasonrl.policies import Planner
from reasonrl.renderers import Diffusion
from reasonrl.renderers.pipelines import Loader
from reasonrl.renderers.steps import CPS, ODE, DanceSDE, FlowSDE


@frozen
class Published:
    """A paper's choices."""

    paper: str
    renderer: Diffusion
    objective: rl.Objective
    sample_with: Mapping[str, str] = {}
    average: float | None = None


def drawn(**changes: Any) -> Diffusion:
    """Returns a renderer with weights of its own: variants by `attrs.evolve` would share what is trained."""
    return Diffusion("nano", text="prompt", num_steps=10, **changes)


PUBLISHED: dict[str, Published] = {
    "flow-grpo": Published(
        "Flow-GRPO, arXiv 2505.05470: all steps by an SDE, clip 1e-4, KL to the start, EMA",
        drawn(kernel=FlowSDE(eta=0.7)),
        DenoisingGRPO(clip=1e-4, kl=0.04, kl_on="means_over_g", scale="batch_std"),
        average=0.987,  # 0.9 every 8 steps
    ),
    "flow-grpo-fast": Published(
        "Flow-GRPO-Fast: the group branches at a random step, and two steps are trained",
        drawn(kernel=CPS(eta=0.8), window="random", window_size=2, window_within=5, start="branched"),
        DenoisingGRPO(clip=1e-5, scale="batch_std"),
    ),
    "dance-grpo": Published(
        "DanceGRPO, arXiv 2505.07818: constant noise, one start for a group, 60% of the steps, no KL",
        drawn(kernel=DanceSDE(eta=0.3), start="shared", window="random", window_size=6),
        DenoisingGRPO(clip=1e-4),
    ),
    "mix-grpo": Published(
        "MixGRPO, arXiv 2507.21802: a window of random steps slides from the first to the last",
        drawn(kernel=FlowSDE(eta=0.7), window="sliding", window_size=4, window_every=25, start="shared"),
        DenoisingGRPO(clip=1e-4),
    ),
    "cps": Published(
        "Coefficients-preserving sampling, arXiv 2509.05952: no noise is added, so none is left",
        drawn(kernel=CPS(eta=0.8)),
        DenoisingGRPO(clip=1e-4),
    ),
    "grpo-guard": Published(
        "GRPO-Guard, arXiv 2510.22319: the ratio corrected to be centred, alike at all steps",
        drawn(kernel=FlowSDE(eta=0.7), record_means=True),
        DenoisingGRPO(ratio="guard", clip=1e-4, scale="batch_std"),
    ),
    "diffusion-nft": Published(
        "DiffusionNFT, arXiv 2509.16117: no likelihood, any solver, a decayed old policy draws",
        drawn(kernel=ODE(), window="early", window_size=4),
        DiffusionNFT(scale="batch_std", kl=1e-4),
        sample_with={"image": "old"},
    ),
    "advantage-weighted": Published(
        "Advantage-weighted regression, arXiv 1910.00177, in the form of AWM, arXiv 2509.25050",
        drawn(kernel=ODE(), window="early", window_size=4),
        AdvantageWeighted(form="linear", kl=0.1),
    ),
    "diffusion-dpo": Published(
        "Diffusion-DPO, arXiv 2311.12908: the best and the worst of a group, beta 2000",
        drawn(kernel=ODE(), window="early", window_size=4),
        DiffusionDPO(),
    ),
}


def recipe_for(name: str, *, steps: int = 60, seed: int = 0) -> rl.Recipe:
    """Returns the recipe that trains the nano flow that way; the planner writes plans and does not learn."""
    published = PUBLISHED[name]
    renderer = evolve(published.renderer, loader=Loader())  # the packaged weights, whatever was trained before
    return rl.Recipe(
        policy=Planner("nano", max_tokens=80),
        renderer=renderer,
        test_renderer=evolve(renderer, kernel=ODE(), window="none", window_size=None, start="own"),
        judge=DualStage("arxiv-v1"),
        objectives={"image": published.objective},
        sample_with=published.sample_with,
        average=published.average,
        prompts="scenes/train",
        prompts_per_step=8,
        group_size=12,
        num_rows=None if published.objective.whole_groups else 48,
        steps=steps,
        learning_rate=2e-4,
        seed=seed,
        tests={"test": "scenes/test"},
        test_judge=ScenePromptImage(),
    )


def main(run: Callable[..., Path] = rl.run) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/denoising"), help="folder for the runs")
    parser.add_argument("--only", nargs="*", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="say what there is, and train nothing")
    asked = parser.parse_args()
    for name in asked.only:
        print(f"{name}: {PUBLISHED[name].paper}", flush=True)
        if not asked.list:
            print(run(recipe_for(name, steps=asked.steps, seed=asked.seed), asked.out / f"{name}-seed{asked.seed}"))


if __name__ == "__main__":
    main()
