"""A judge that asks one question about each trajectory: what the four of the dual-stage reward share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from reasonrl.errors import ConfigError, ContractError
from reasonrl.judges.vlm import VLM, Choice, Question, Reply, Rubric, marks, read, yes_no
from reasonrl.types import Score, Trajectory, Verdict

Scoring = Literal["auto", "expected", "yes-no", "json"]
"""How a reply becomes a score: the expected mark over the first token's digits, p(yes) / (p(yes) + p(no)), or the mark
in a JSON object (GoT-R1's published form). "auto" is "expected" where log-probs are to be had, else "json"."""

SCORINGS = get_args(Scoring)


def answer_for(scoring: Scoring, vlm: VLM, *, low: int, thoughts: tuple[str, ...]) -> Choice | Rubric:
    """Returns the form of the answer; `low` is the lowest mark of the published 10, 0 or 1, and what it is worth."""
    if scoring == "yes-no":
        return yes_no()
    if scoring == "expected" or (scoring == "auto" and vlm.log_probs):
        return marks(low, 9, floor=low / 10)
    return Rubric(thoughts, low, 10)


def check_scoring(judge: object, scoring: Scoring, vlm: object) -> None:
    """Raises ConfigError for whom nobody can ask, and for log-probs that nobody gives."""
    if not isinstance(vlm, VLM):
        raise ConfigError(
            f"{type(judge).__name__} asks a VLM, got {type(vlm).__name__}: give a Server(...), a Local(...) or a"
            " Cached(...)"
        )
    if scoring in ("expected", "yes-no") and not vlm.log_probs:
        raise ConfigError(
            f"scoring={scoring!r} needs log-probs, which {vlm.identity} does not give: use 'json' or 'auto'"
        )


def judged(
    name: str, trajectories: Sequence[Trajectory], vlm: VLM, question_of: Callable[[Trajectory], Question | Score]
) -> list[Verdict]:
    """Returns a verdict each, all questions asked at once; `question_of` may decide without asking."""
    asked = [question_of(trajectory) for trajectory in trajectories]
    questions = [each for each in asked if isinstance(each, Question)]
    replies = vlm.ask(questions) if questions else []
    if len(replies) != len(questions):
        raise ContractError(
            f"{type(vlm).__name__} gave {len(replies)} replies to {len(questions)} questions: one each, in order"
        )
    given = iter(zip(questions, replies, strict=True))
    scores = [each if isinstance(each, Score) else _scored(*next(given)) for each in asked]
    return [Verdict.of(name, score) for score in scores]


def _scored(question: Question, reply: Reply) -> Score:
    assert isinstance(question.answer, Choice | Rubric)
    return read(question.answer, reply)


def bands(texts: dict[str, str], answer: Choice | Rubric) -> str:
    """Returns what the marks mean ("marks" of digits, "json" of ten), or the question behind a "yes"."""
    if isinstance(answer, Rubric):
        return texts["json"]
    return texts["yes"] if answer.options == ("yes", "no") else texts["marks"]
