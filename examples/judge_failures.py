"""What a failing judge does to training: failures left out of it, or counted as zeros, as most trainers do.

    python examples/judge_failures.py --out runs/failures                       # every run, one after the other
    python examples/judge_failures.py --out runs/failures --only zero-20 --seed 1

The recipe of got_r1_nano.py, whose judge fails at random for a share of the trajectories ("left-out-20", "zero-20"), or
always for plans of three objects and more, as a judge with a limit of time or context does: where it has to count
("zero-counting", about a fifth of the trajectories) or everywhere ("zero-long", about half).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import evolve, field, frozen, validators

import reasonrl as rl

LONG = 3
"""Planned objects from which on a plan is long."""


@frozen
class Failing(rl.Judge):
    """A judge that fails for a share of the trajectories, by a seed and what they say; raw scores stay as they are."""

    part: rl.Judge
    share: float = field(validator=[validators.ge(0), validators.le(1)])
    worth: Literal["nothing", "zero"] = "nothing"
    """What a failure counts as: "nothing" = unscored, left out; "zero" = a bad picture."""
    only_long: bool = False
    """Fails for long plans only."""
    only_counting: bool = False
    """Fails for prompts that ask for a number only."""
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        return self.part.stages

    def judge(self, trajectories: Sequence[rl.Trajectory]) -> list[rl.Verdict]:
        verdicts = self.part.judge(trajectories)
        return [self._seen(t, v) for t, v in zip(trajectories, verdicts, strict=True)]

    def _seen(self, trajectory: rl.Trajectory, verdict: rl.Verdict) -> rl.Verdict:
        if not self.fails(trajectory):
            return verdict
        value = None if self.worth == "nothing" else 0.0
        terms = {s: tuple(evolve(term, value=value) for term in terms) for s, terms in verdict.terms.items()}
        return rl.Verdict(terms, {**verdict.scores, "failed": rl.Score(value, "timed out: on purpose")})

    def fails(self, trajectory: rl.Trajectory) -> bool:
        if self.only_counting and trajectory.prompt.facts.get("category") != "numeracy":
            return False
        if self.only_long and len(rl.Plan.parse(trajectory.reasoning or "").objects) < LONG:
            return False
        said = f"{self.seed}/{trajectory.prompt.id}/{trajectory.member}/{trajectory.reasoning}"
        picture = trajectory.image.tobytes() if trajectory.image else b""
        drawn = int.from_bytes(hashlib.sha256(said.encode() + picture).digest()[:8], "big")
        return drawn < self.share * 2**64


RUNS: dict[str, dict[str, object]] = {
    "none": {"share": 0.0},
    "left-out-5": {"share": 0.05},
    "zero-5": {"share": 0.05, "worth": "zero"},
    "left-out-20": {"share": 0.2},
    "zero-20": {"share": 0.2, "worth": "zero"},
    "left-out-counting": {"share": 1.0, "only_long": True, "only_counting": True},
    "zero-counting": {"share": 1.0, "only_long": True, "only_counting": True, "worth": "zero"},
    "left-out-long": {"share": 1.0, "only_long": True},
    "zero-long": {"share": 1.0, "only_long": True, "worth": "zero"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name in asked.only:
        recipe = evolve(recipe_for(name, seed=asked.seed), steps=asked.steps)
        print(name, rl.run(recipe, asked.out / f"{name}-seed{asked.seed}"), flush=True)


def recipe_for(name: str, *, seed: int) -> rl.Recipe:
    spec = importlib.util.spec_from_file_location("got_r1_nano", Path(__file__).with_name("got_r1_nano.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nano = module.recipe
    assert isinstance(nano, rl.Recipe)
    tests = {split: nano.tests[split] for split in ("test", "held_out", "counts")}
    judge = Failing(nano.judge, seed=seed, **RUNS[name])  # type: ignore[arg-type]
    return evolve(nano, judge=judge, seed=seed, tests=tests, max_unscored=1.0)


if __name__ == "__main__":
    main()
