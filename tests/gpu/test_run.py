"""A whole run on a GPU: place, sample, judge, replay with a reference, step, save, resume."""

import json
import math

import pytest
import torch

import reasonrl as rl
from reasonrl.judges import DualStage
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest tests/gpu` on one"),
]


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 4, "dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_a_run_steps_saves_and_resumes_on_the_gpu(fields, tmp_path):
    def recipe(steps):
        return rl.Recipe(
            policy=GoTR1("nano", guidance=2.0, max_tokens=60, **fields),
            renderer=Tokens(),
            judge=DualStage("arxiv-v1"),
            objective=GRPO(kl=0.01),
            prompts="scenes/train",
            group_size=4,
            prompts_per_step=3,
            steps=steps,
            save_every=1,
        )

    one = recipe(1)
    rl.run(one, tmp_path / "run", quiet=True)
    assert next(one.policy.module.parameters()).is_cuda
    rl.run(recipe(2), tmp_path / "run", resume=True, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["grad_norm"]) and not line["skipped"] for line in lines)
    assert abs(lines[0]["image/ratio"] - 1) < (0.05 if "dtype" in fields else 1e-3)
