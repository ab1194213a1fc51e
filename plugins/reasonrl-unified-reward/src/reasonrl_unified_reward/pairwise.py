"""UnifiedRewardPairwise: which of two pictures is better, and how often a picture wins within its group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, final

from attrs import define, field, frozen, validators

from reasonrl import Judge, Score, Trajectory, Verdict
from reasonrl.judges.vlm import VLM, Question, Reply, Text, quoted, total_cost
from reasonrl_unified_reward import wording
from reasonrl_unified_reward.pairing import pairs_of

NO_COMPARISON = "no comparison"
"""What a note begins with where a group has no second picture."""


@define(eq=False)
class Tally:
    """What became of one picture's comparisons."""

    wins: list[float] = field(factory=list)
    notes: list[str] = field(factory=list)
    costs: list[Mapping[str, float]] = field(factory=list)

    @property
    def score(self) -> Score:
        """The mean of the comparisons that were answered; None, with the first reason, where none was."""
        cost = total_cost(self.costs)
        if not self.wins:
            return Score(
                None, self.notes[0] if self.notes else f"{NO_COMPARISON}: no other picture of its prompt", cost
            )
        asked = len(self.wins) + len(self.notes)
        note = f"{len(self.wins)} of {asked} comparisons: {self.notes[0]}" if self.notes else ""
        return Score(sum(self.wins) / len(self.wins), note, cost)


@final
@frozen
class UnifiedRewardPairwise(Judge):
    """The share of comparisons that a picture wins within its group, in [0, 1]; a tie is half a win.

    A UnifiedReward-Think model is shown two pictures of one prompt (Pref-GRPO's reward, arXiv 2508.20751). With two
    orders every pair is asked as (a, b) and (b, a), and counts the mean: whatever a model adds for the first place
    cancels. A pair with an answer missing is left out, not a half, and a picture without any pair abstains. While no
    pair is left out, the scores of a group average 1/2. The answer has the published form, the question our words:
    see `wording`.

    Cost: orders · G(G−1)/2 questions for a group of G, 240 for 16; `opponents` makes it orders · G · opponents / 2.
    """

    vlm: VLM
    opponents: int | None = field(default=None, validator=validators.optional(validators.gt(0)), kw_only=True)
    """How many others each picture meets, drawn by the prompt's id and `seed`; None = all of them. Everybody meets
    equally many: one more than asked for where both this and the group's size are odd."""
    orders: Literal[1, 2] = field(default=2, validator=validators.in_((1, 2)), kw_only=True)
    """1 halves the cost: pictures take turns at the first place, which cancels its advantage only on average."""
    seed: int = field(default=0, kw_only=True)
    system: str = field(default=wording.SYSTEM, kw_only=True)
    template: str = wording.template(wording.PAIRWISE)
    instruction: str = field(default=wording.VERDICT, kw_only=True)
    max_tokens: int = field(default=2048, validator=validators.gt(0), kw_only=True)
    needs = frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one win rate each; no image is a 0, and takes part in no comparison."""
        groups: dict[str, list[int]] = defaultdict(list)
        for k, trajectory in enumerate(trajectories):
            if trajectory.image is not None:
                groups[trajectory.prompt.id].append(k)
        pairs = [pair for group in groups.values() for pair in self._pairs(group, trajectories)]
        questions = [self._question(*turn, trajectories) for pair in pairs for turn in self._turns(pair)]
        replies = self.vlm.ask(questions) if questions else []
        tallies = {k: Tally() for group in groups.values() for k in group}
        for number, (a, b) in enumerate(pairs):
            self._count(replies[number * self.orders : (number + 1) * self.orders], tallies[a], tallies[b])
        missing = Score(0.0, "no image")
        scores = [tallies[k].score if k in tallies else missing for k in range(len(trajectories))]
        return [Verdict.of("UnifiedRewardPairwise", score) for score in scores]

    def _pairs(self, group: Sequence[int], trajectories: Sequence[Trajectory]) -> list[tuple[int, int]]:
        """Returns pairs of rows; the pairing depends on members, not on the rows they stand in."""
        by_member = sorted(group, key=lambda k: trajectories[k].member)
        seed = f"{self.seed}/{trajectories[group[0]].prompt.id}"
        return [(by_member[i], by_member[j]) for i, j in pairs_of(len(group), self.opponents, seed=seed)]

    def _turns(self, pair: tuple[int, int]) -> list[tuple[int, int]]:
        return [pair, pair[::-1]][: self.orders]

    def _question(self, first: int, second: int, trajectories: Sequence[Trajectory]) -> Question:
        images = trajectories[first].image, trajectories[second].image
        assert images[0] is not None
        assert images[1] is not None
        text = self.template.replace(wording.CAPTION, quoted("caption", trajectories[first].prompt.text))
        answer = Text(self.instruction, self.max_tokens)
        return Question(self.system, text, (images[0], images[1]), answer=answer)

    def _count(self, replies: Sequence[Reply], a: Tally, b: Tally) -> None:
        """Adds one pair to both tallies: its mean over the orders, or why it is left out; each bears half the cost."""
        read = [(None, reply.note) if reply.note else wording.first_wins(reply.text) for reply in replies]
        wins = [value if turn == 0 else 1 - value for turn, (value, _) in enumerate(read) if value is not None]
        half = {name: value / 2 for name, value in total_cost([reply.cost for reply in replies]).items()}
        for tally in (a, b):
            tally.costs.append(half)
        if len(wins) < len(read):
            note = next(note for value, note in read if value is None)
            a.notes.append(note)
            b.notes.append(note)
            return
        won = sum(wins) / len(wins)
        a.wins.append(won)
        b.wins.append(1 - won)
