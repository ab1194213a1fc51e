"""GoT-R1 on Janus-Pro: the paper's training recipe (arXiv 2505.17022), and our choice wherever it names none.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --served-model-name Qwen2.5-VL-7B --limit-mm-per-prompt '{"image": 2}'
    reasonrl judge audit examples/got_r1_janus_pro.py
    reasonrl doctor examples/got_r1_janus_pro.py
    reasonrl train examples/got_r1_janus_pro.py

The reward asks Qwen2.5-VL-7B four questions about every trajectory, R_PI · (R_sem + R_spa) · R_RI, on a server of your
own (docs/serving-a-judge.md); elsewhere: `--set judge.vlm.inner.url=http://judge:8000/v1`. The later form of the paper
has a preference factor too: `recipe_for(PROMPTS, CHECKPOINT, DualStage("iclr-2026", vlm=VLM, preference=HPS()))`.

Without a second model, plans alone: got_r1_janus_pro_plans.py. A 24 GB card: got_r1_janus_pro_24gb.py. What each
setting is, and its memory: docs/janus-pro.md.
"""

from __future__ import annotations

import reasonrl as rl
from reasonrl.judges import DualStage
from reasonrl.judges.cached import Cached
from reasonrl.judges.server import Server
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

# Our choice: the one published model that writes plans. The paper starts from Janus-Pro after supervised training on
# plans, which is not published. Janus-Pro as published was never taught to write boxes: every plan would earn a 0.
CHECKPOINT = "gogoduan/GoT-R1-1B"
# The paper: T2I-CompBench's training prompts and Laion-Aesthetics, mixed it does not say how. Our choice: the former.
PROMPTS = "t2i-compbench/*_train.txt"
# The paper: Qwen2.5-VL-7B. Our choice: expected marks, since a server of one's own gives log-probs.
VLM = Cached(Server("Qwen2.5-VL-7B", "http://127.0.0.1:8000/v1"), "~/.cache/reasonrl/judge")
JUDGE = DualStage("arxiv-v1", vlm=VLM)


def recipe_for(prompts: str, checkpoint: str, judge: rl.Judge = JUDGE) -> rl.Recipe:
    """Returns the recipe; every stage that the judge speaks of learns."""
    policy = GoTR1(
        checkpoint,
        temperature=1.0,  # the paper, for text and image
        # Our choice: the guidance that the paper evaluates with. Replayed log-probs are guided too, so that what is
        # trained is what was sampled; the paper says neither.
        guidance=5.0,
        max_tokens=601,  # the authors' code: 600 are drawn, and begin-of-image is put behind them
        images_per_plan=1,  # the paper: 16 plans with an image each
        lora_rank=32,  # the paper
        lora_alpha=32,  # the paper
        # Our choice: adapters of all seven linear layers of the language model's blocks, heads and embeddings frozen.
        # The paper adapts "the MLLM", and T2I-R1 freezes the image head too.
        trained=("language_model",),
        gradient_checkpointing=True,  # our choice: a fourth more work, and far less memory
    )
    objective = GRPO(
        # Our choice: DeepSeekMath's. With one update a step the ratio is 1, and nothing is clipped.
        clip=0.2,
        # Our choice: T2I-R1's, on the same base model. Both appear in the paper's objective without a value.
        kl=0.01,
    )
    learns = tuple(stage for stage in policy.stages if judge.stages & {stage, rl.EVERY})
    return rl.Recipe(
        policy=policy,
        renderer=Tokens(checkpoint),
        judge=judge,
        # The paper: the loss is over the whole sequence, text and image tokens together. Our choice: each token of the
        # step weighs the same, so 576 image tokens outweigh a plan of some 200; give each stage a GRPO of its own
        # ({"reasoning": ..., "image": ...}) to have both count alike.
        objectives={learns: objective},
        prompts=prompts,
        steps=1000,  # the paper
        # The paper: "batch size 8", of prompts, or of sequences a device, it does not say. Our choice: prompts.
        prompts_per_step=8,
        group_size=16,  # the paper's N
        num_updates=1,  # our choice: on-policy, as T2I-R1
        num_rows=8,  # our choice: memory alone, never the gradient
        learning_rate=1e-5,  # the paper
        schedule="cosine",  # the paper
        warmup_steps=0,  # our choice: the paper names none
        weight_decay=0.0,  # our choice: the paper names none
        max_grad_norm=1.0,  # our choice: T2I-R1's
        overlap=4,  # our choice: time alone; three quarters of a step's judging can hide behind drawing
        seed=0,  # our choice: any will do
    )


recipe = recipe_for(PROMPTS, CHECKPOINT)

if __name__ == "__main__":
    rl.run(recipe, "runs/got_r1_janus_pro")
