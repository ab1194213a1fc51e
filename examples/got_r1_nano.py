"""GoT-R1 on the drawn world: a model learns to plan and draw scenes, on a laptop, in minutes.

reasonrl train examples/got_r1_nano.py
"""

import reasonrl as rl
from reasonrl.judges import DualStage, ScenePromptImage
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

recipe = rl.Recipe(
    policy=GoTR1("nano", guidance=1.0, max_tokens=80),
    renderer=Tokens(),
    judge=DualStage("arxiv-v1"),
    objective=GRPO(clip=0.2),
    prompts="scenes/train",
    prompts_per_step=12,
    group_size=12,
    num_rows=24,
    steps=120,
    learning_rate=2e-4,
    seed=0,
    tests={name: f"scenes/{name}" for name in ("test", "held_out", "inverted", "counts", "longer")},
    test_judge=ScenePromptImage(),
)

if __name__ == "__main__":
    rl.run(recipe, "runs/got_r1_nano")
