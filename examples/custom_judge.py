"""A judge of your own, and how judges combine: python examples/custom_judge.py.

Two hand-made trajectories are judged: one drew the red cup it planned, one drew nothing but gray.
"""

import numpy as np
from attrs import field, frozen, validators
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from reasonrl import EVERY, Judge, PointwiseJudge, Prompt, Trajectory


@frozen
class Redness(PointwiseJudge):
    """How much of the image is red, in [0, 1]; `enough` is the fraction that earns a 1."""

    enough: float = field(default=0.2, validator=validators.gt(0))
    needs = frozenset({"image"})

    def score(self, trajectory: Trajectory) -> float | None:
        """Scores one trajectory."""
        if trajectory.image is None:
            return None
        red, green, blue = np.asarray(trajectory.image.convert("RGB"), dtype=int).transpose(2, 0, 1)
        is_red = (red > 150) & (green < 100) & (blue < 100)
        return min(1.0, float(is_red.mean()) / self.enough)


@frozen
class Mentions(PointwiseJudge):
    """Whether the reasoning holds a word, 0 or 1. No reasoning is a 0: the policy wrote none."""

    word: str

    def score(self, trajectory: Trajectory) -> float:
        """Scores one trajectory."""
        return float(self.word in (trajectory.reasoning or ""))


def reward() -> Judge:
    """The image counts only where the cup is named; the reasoning earns a bonus for its colour."""
    gate = Mentions("cup").named("names the cup")
    bonus = Mentions("red").named("names the colour")
    return gate * Redness() + 0.5 * bonus.on("reasoning")


def trajectories() -> list[Trajectory]:
    prompt = Prompt("cup", "a red cup")
    drawn = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawn).rectangle((16, 16, 47, 47), fill="red")
    gray = Image.new("RGB", (64, 64), "gray")
    good = Trajectory(prompt, (0,), texts={"reasoning": "a red cup"}, images={"image": drawn})
    poor = Trajectory(prompt, (1,), texts={"reasoning": "a red cup"}, images={"image": gray})
    return [good, poor]


def main() -> None:
    judge = reward()
    table = Table("trajectory", "stage", "terms", "reward", title="a red cup")
    for name, verdict in zip(("drawn", "gray"), judge.judge(trajectories()), strict=True):
        for stage in ("reasoning", EVERY):
            terms = verdict.on(stage) or ()
            said = " + ".join(f"{term.weight:g} x {term.name} ({term.value})" for term in terms)
            table.add_row(name, "all others" if stage == EVERY else stage, said, str(verdict.total(stage)))
    Console().print(table)


if __name__ == "__main__":
    main()
