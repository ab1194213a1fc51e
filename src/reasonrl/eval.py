"""Evaluation: one sample a prompt, judged; exact means a score of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import frozen

from reasonrl.interfaces import Judge, Policy, Renderer
from reasonrl.noise import Draw
from reasonrl.rollout import Guarded, draw_trajectories
from reasonrl.types import Prompt, Trajectory, Verdict

EVALUATION_SEED = 1_000_003
"""Evaluation draws its own noise: the same before and after, and never a training step's."""


@frozen(eq=False)
class Answer:
    """One evaluated prompt; `exact` is None where the judge abstained."""

    split: str
    category: str
    trajectory: Trajectory
    verdict: Verdict

    @property
    def exact(self) -> bool | None:
        """Whether the judge's total is 1."""
        total = self.verdict.total("image")
        return None if total is None else total >= 1.0

    def record(self) -> dict[str, Any]:
        """Returns it as one line of evaluations.jsonl, without the image."""
        costs = {name: dict(score.cost) for name, score in self.verdict.scores.items() if score.cost}
        return {
            "split": self.split,
            "category": self.category,
            "prompt_id": self.trajectory.prompt.id,
            "prompt": self.trajectory.prompt.text,
            "exact": self.exact,
            "scores": {name: score.value for name, score in self.verdict.scores.items()},
            "notes": {name: s.note for name, s in self.verdict.scores.items() if s.note},
            "reasoning": self.trajectory.reasoning,
            **({"costs": costs} if costs else {}),
        }


def evaluate(
    policy: Policy,
    renderer: Renderer | None,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    split: str,
    category_of: Callable[[Prompt], str] = lambda prompt: str(prompt.facts.get("category", "all")),
    rows: int = 128,
    timeout_s: float = 600.0,
    seed: int = EVALUATION_SEED,
) -> Iterator[Answer]:
    """Yields one answer a prompt, in order."""
    guarded = Guarded(judge, timeout_s)
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        drawn = draw_trajectories(policy, renderer, chunk, group_size=1, draw=Draw(seed, 0))
        verdicts = guarded.judge([t.shown() for t in drawn])
        for trajectory, verdict in zip(drawn, verdicts, strict=True):
            yield Answer(split, category_of(trajectory.prompt), trajectory, verdict)
