"""Makes the packaged nano checkpoint: supervised on demonstrations of the drawn world by an imperfect teacher.

    python examples/nano_sft.py --out first --steps 2000
    python examples/nano_sft.py --out second --start first --steps 1500 --learning-rate 1e-3 --seed 1 --noise 0.01
    python examples/nano_sft.py --out src/reasonrl/scenes/nano --start second --steps 1500 --learning-rate 1e-3 --seed 2

The teacher draws the wrong relation in 30% of relations, the wrong attribute in 15% of prompts, the wrong number in
25% of counts, and some of its image tokens are random: the model learns to plan and draw, and leaves room for RL.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from reasonrl import Prompt, Recipe, Trajectory, train
from reasonrl.objectives import Supervised
from reasonrl.policies import GoTR1
from reasonrl.rollout import demonstrations
from reasonrl.scenes import compose, nano, splits

BATCH = 32


class Teacher:
    """Demonstrations of a step, a function of (seed, step) alone."""

    def __init__(self, seed: int, faults: compose.Faults) -> None:
        self.prompts = splits.stream("train", seed=seed + 1)
        self.faults, self.seed = faults, seed

    def __call__(self, step: int) -> Sequence[Trajectory]:
        rng = np.random.default_rng([self.seed, step])
        shown = [compose.demonstration(next(self.prompts), rng, self.faults) for _ in range(BATCH)]
        return [
            Trajectory(
                Prompt(f"{step}:{i}", d.prompt),
                (0,),
                texts={"reasoning": d.plan_text},
                artifacts={"image_tokens": d.tokens},
            )
            for i, d in enumerate(shown)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="go on from this checkpoint instead of an untrained one")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.02,
        help="share of the teacher's image tokens that are random",
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as untrained:
        nano.build(Path(untrained), seed=asked.seed)
        policy = GoTR1(asked.start or untrained, guidance=1.0)
        recipe = Recipe(
            policy=policy,
            objective=Supervised(),
            steps=asked.steps,
            learning_rate=asked.learning_rate,
            schedule="cosine",
            warmup_steps=100,
            seed=asked.seed,
        )
        began = time.perf_counter()

        def observe(event: str, **facts: object) -> None:
            if event == "update_end" and int(str(facts["step"])) % 50 == 0:
                metrics = facts["metrics"]
                assert isinstance(metrics, Mapping)
                nats = "  ".join(f"{k} {float(v):.3f}" for k, v in metrics.items())
                print(f"step {facts['step']}  {nats}  {time.perf_counter() - began:.0f} s", flush=True)
            if event == "step_end" and int(str(facts["step"])) % 500 == 499:
                policy.save(asked.out)  # something to look at before the end

        train(
            recipe,
            demonstrations(recipe, Teacher(asked.seed, compose.Faults(corrupted_tokens=asked.noise))),
            observe=observe,
        )
        policy.save(asked.out)
    halve(asked.out / "model.safetensors")


def halve(path: Path) -> None:
    """Stores the weights in bfloat16: half the size, and the loader widens them again."""
    save_file(
        {k: v.to(torch.bfloat16) for k, v in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )


if __name__ == "__main__":
    main()
