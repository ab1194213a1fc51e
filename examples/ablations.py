"""GoT-R1's ablations of the reward, on the drawn world (arXiv 2505.17022, tables 4 and 5).

python examples/ablations.py --out runs/ablations            # all of them, one after the other
python examples/ablations.py --out runs/ablations --only full sum
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from attrs import evolve

import reasonrl as rl
from reasonrl.judges import ScenePromptImage, SceneReasoningImage, SceneSemantic, SceneSpatial

PROMPT_IMAGE, SEMANTIC = ScenePromptImage(), SceneSemantic()
SPATIAL, REASONING_IMAGE = SceneSpatial(), SceneReasoningImage()

REWARDS: dict[str, rl.Judge] = {
    "full": PROMPT_IMAGE * (SEMANTIC + SPATIAL) * REASONING_IMAGE,
    "sum": PROMPT_IMAGE + SEMANTIC + SPATIAL + REASONING_IMAGE,
    "only_reasoning_image": REASONING_IMAGE,
    "only_prompt_image": PROMPT_IMAGE,
    "without_spatial": PROMPT_IMAGE * SEMANTIC * REASONING_IMAGE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    base = nano_recipe()
    for name in asked.only:
        recipe = evolve(base, judge=REWARDS[name], steps=asked.steps, seed=asked.seed)
        print(name, rl.run(recipe, asked.out / f"{name}-seed{asked.seed}"), flush=True)


def nano_recipe() -> rl.Recipe:
    spec = importlib.util.spec_from_file_location("got_r1_nano", Path(__file__).with_name("got_r1_nano.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.recipe
    assert isinstance(found, rl.Recipe)
    return found


if __name__ == "__main__":
    main()
