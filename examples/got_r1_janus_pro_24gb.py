"""`got_r1_janus_pro.py` for one card of 24 GB: the same algorithm and the same gradient a prompt, a smaller step.

    reasonrl train examples/got_r1_janus_pro_24gb.py --set judge.vlm.inner.url=http://judge:8000/v1

The judge needs a card of its own. Computed for Janus-Pro-1B in bfloat16, not measured (docs/janus-pro.md has the
arithmetic): weights 4.2 GB; adapters, their gradient, moments and reference 0.6 GB; then at most 11.5 GB while 32
trajectories are drawn, or 1.3 GB while two are replayed. Janus-Pro-7B does not fit: its weights are 14.8 GB, and a
group of 16 takes up to 14.3 GB to draw.
"""

import importlib.util
from pathlib import Path

from attrs import evolve

import reasonrl as rl

spec = importlib.util.spec_from_file_location("got_r1_janus_pro", Path(__file__).with_name("got_r1_janus_pro.py"))
assert spec is not None
assert spec.loader is not None
whole = importlib.util.module_from_spec(spec)
spec.loader.exec_module(whole)


def smaller(recipe: rl.Recipe) -> rl.Recipe:
    """Returns the recipe with a quarter of the prompts a step, and as many steps as show as many prompts."""
    return evolve(
        recipe,
        prompts_per_step=2,  # our choice: a group is whole, so 32 trajectories a step
        steps=4 * recipe.steps,
        learning_rate=recipe.learning_rate / 2,  # our choice: by the square root of the batch
        num_rows=2,  # our choice: memory alone
        save_every=100,
    )


recipe = smaller(whole.recipe_for(whole.PROMPTS, whole.CHECKPOINT))

if __name__ == "__main__":
    rl.run(recipe, "runs/got_r1_janus_pro_24gb")
