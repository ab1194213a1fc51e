"""UnifiedReward: marks for one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from attrs import field, frozen, validators

from reasonrl import EVERY, Judge, Score, Term, Trajectory, Verdict
from reasonrl.judges.vlm import VLM, Question, Reply, Text, quoted
from reasonrl_unified_reward import wording

Dimension = Literal["alignment", "coherence", "style", "final"]
DIMENSIONS = ("alignment", "coherence", "style", "final")


@final
@frozen
class UnifiedReward(Judge):
    """Marks from 1 to 5 by a UnifiedReward model, in [0, 1]: the mean of (mark − 1) / 4 over `dimensions`.

    The models of 2.0 mark alignment, coherence and style; those of 1.x give one mark, `dimensions=("final",)`. Peers
    divide by 5, which differs by a constant and a factor. A reply without every mark asked for abstains: none is
    made up. The answer has the published form, the question our words: see `wording`.
    """

    vlm: VLM
    dimensions: tuple[Dimension, ...] = field(
        default=("alignment", "coherence", "style"),
        converter=tuple,
        validator=[validators.min_len(1), validators.deep_iterable(validators.in_(DIMENSIONS))],
        kw_only=True,
    )
    system: str = field(default=wording.SYSTEM, kw_only=True)
    template: str = wording.template(wording.POINTWISE)
    instruction: str | None = field(default=None, kw_only=True)
    """What form the answer takes; None = the published one of these dimensions."""
    max_tokens: int = field(default=512, validator=validators.gt(0), kw_only=True)
    needs = frozenset({"image"})

    def __attrs_post_init__(self) -> None:
        twice = len(set(self.dimensions)) < len(self.dimensions)
        if twice or ("final" in self.dimensions and len(self.dimensions) > 1):
            raise ValueError(
                f"dimensions are some of alignment, coherence and style, or 'final' alone, got {self.dimensions}"
            )

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one score each, and every mark beside it; no image is a 0, no clear answer None with the reason."""
        drawn = [k for k, trajectory in enumerate(trajectories) if trajectory.image is not None]
        replies = self.vlm.ask([self._question(trajectories[k]) for k in drawn]) if drawn else []
        found = dict(zip(drawn, replies, strict=True))
        return [self._verdict(found.get(k)) for k in range(len(trajectories))]

    def _question(self, trajectory: Trajectory) -> Question:
        assert trajectory.image is not None
        usual = wording.FINAL if "final" in self.dimensions else wording.SCORES
        text = self.template.replace(wording.CAPTION, quoted("caption", trajectory.prompt.text))
        answer = Text(usual if self.instruction is None else self.instruction, self.max_tokens)
        return Question(self.system, text, (trajectory.image,), answer=answer)

    def _verdict(self, reply: Reply | None) -> Verdict:
        if reply is None:
            return self._said(dict.fromkeys(self.dimensions, 0.0), Score(0.0, "no image"))
        if reply.note:
            return self._said({}, Score(None, reply.note, reply.cost))
        marks, note = wording.marks(reply.text, self.dimensions)
        if note:
            return self._said({}, Score(None, note, reply.cost))
        units = {name: (mark - 1) / 4 for name, mark in marks.items()}
        return self._said(units, Score(sum(units.values()) / len(units), "", reply.cost))

    def _said(self, units: dict[str, float], score: Score) -> Verdict:
        """Returns one term, and beside its score one for each dimension, which cost nothing more."""
        parts = {f"UnifiedReward.{name}": Score(units.get(name), score.note) for name in self.dimensions}
        beside = parts if len(parts) > 1 else {}
        return Verdict({EVERY: (Term("UnifiedReward", score.value),)}, {"UnifiedReward": score, **beside})
