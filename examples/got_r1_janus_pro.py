"""GoT-R1 on Janus-Pro: the paper's training recipe (arXiv 2505.17022), and our choice wherever it names none.

    reasonrl doctor examples/got_r1_janus_pro.py --set prompts=t2i-compbench/spatial_train.txt
    reasonrl train examples/got_r1_janus_pro.py --prompts t2i-compbench/spatial_train.txt

The paper's reward asks Qwen2.5-VL-7B four questions, R_PI · (R_sem + R_spa) / 2 · R_RI · R_HPS. No judge here asks a
model yet. What stands in its place reads the plan alone: is it well formed, and does it put the objects of a spatial
prompt where the prompt wants them. So the reasoning learns, and the image tokens, of which it says nothing, do not.
With judges of your own the rest is trained too: `recipe_for(prompts, checkpoint, judge=DualStage(...))`.

A 24 GB card: got_r1_janus_pro_24gb.py. What each setting is, and its memory: docs/janus-pro.md.
"""

from __future__ import annotations

from attrs import frozen

import reasonrl as rl
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.relations import find_relation, holds
from reasonrl.renderers import Tokens
from reasonrl.types import Stop

# Our choice: the one published model that writes plans. The paper starts from Janus-Pro after supervised training on
# plans, which is not published. Janus-Pro as published was never taught to write boxes: every plan would earn a 0.
CHECKPOINT = "gogoduan/GoT-R1-1B"
# The paper: T2I-CompBench's training prompts and Laion-Aesthetics, mixed it does not say how. Our choice: the 700 of
# T2I-CompBench that the judge below can read. Every training file at once is "t2i-compbench/*_train.txt".
PROMPTS = "t2i-compbench/spatial_train.txt"


@frozen
class WellFormed(rl.PointwiseJudge):
    """Whether the plan can be drawn by: the fraction of its objects that have a readable box, in [0, 1].

    0 where nothing is planned, and where the plan had to be cut off.
    """

    def score(self, trajectory: rl.Trajectory) -> rl.Score:
        """Scores one plan."""
        if trajectory.stop is not Stop.END:
            return rl.Score(0.0, "the plan did not end by itself")
        objects = rl.Plan.parse(trajectory.reasoning or "").objects
        boxed = sum(each.box is not None for each in objects)
        return rl.Score(boxed / len(objects) if objects else 0.0)


@frozen
class PlannedRelation(rl.PointwiseJudge):
    """Whether the planned boxes hold the prompt's relation ("a horse on the right of a man"): 1, 0.1 if not.

    0 where either object has no box. With several boxes of a name all pairs must hold it: planning a horse on either
    side earns nothing. A prompt without a relation is left unscored.
    """

    def score(self, trajectory: rl.Trajectory) -> rl.Score:
        """Scores one plan."""
        asked = find_relation(trajectory.prompt.text)
        if asked is None:
            return rl.Score(None, "the prompt names no spatial relation")
        left, relation, right = asked
        plan = rl.Plan.parse(trajectory.reasoning or "")
        pairs = [(a, b) for a in boxes_of(left, plan) for b in boxes_of(right, plan)]
        if not pairs:
            return rl.Score(0.0, f"no box for {left!r} or for {right!r}")
        return rl.Score(1.0 if all(holds(relation, a, b) for a, b in pairs) else 0.1)


def boxes_of(part: str, plan: rl.Plan) -> list[rl.Box]:
    """Returns the boxes of objects whose name has every word of a prompt's part, articles and verbs aside."""
    wanted = set(part.lower().split()) - {"a", "an", "the", "is", "was", "are", "were"}
    return [o.box for o in plan.objects if o.box and wanted <= set(o.name.lower().split())]


def recipe_for(prompts: str, checkpoint: str, judge: rl.Judge | None = None) -> rl.Recipe:
    """Returns the recipe; every stage that the judge speaks of learns. None: the stand-in, for plans."""
    judge = judge or (WellFormed() * PlannedRelation()).on("reasoning")
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
        seed=0,  # our choice: any will do
    )


recipe = recipe_for(PROMPTS, CHECKPOINT)

if __name__ == "__main__":
    rl.run(recipe, "runs/got_r1_janus_pro")
