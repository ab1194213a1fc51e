"""A VLM that says what a test tells it to, and remembers what it was asked."""

import threading
from collections.abc import Callable, Sequence

from attrs import define, field

from reasonrl.judges.vlm import VLM, Choice, Coordinates, Question, Reply, Rubric

Says = Callable[[Question], Reply | str | dict[str, float]]


def certain(text: str) -> dict[str, float]:
    """The log-probs of a model that knows its first token."""
    return {text: 0.0}


def best(question: Question) -> Reply | str | dict[str, float]:
    """The highest mark, in whatever form is asked for; one box in the middle."""
    if isinstance(question.answer, Choice):
        return certain(question.answer.options[0 if question.answer.options[0] == "yes" else -1])
    if isinstance(question.answer, Rubric):
        thoughts = "".join(f'"{name}": "as asked", ' for name in question.answer.thoughts)
        return f'{{{thoughts}"score": {question.answer.high}}}'
    return '[{"bbox_2d": [250, 250, 750, 750], "label": "it"}]'


@define(eq=False)
class Scripted(VLM):
    """Answers by a function: a text, log-probs of the first token, or a whole reply."""

    says: Says = best
    log_probs: bool = True
    coordinates: Coordinates = "thousandths"
    identity: str = "scripted"
    asked: list[Question] = field(factory=list)
    calls: list[tuple[str, int]] = field(factory=list)
    """Thread and number of questions of each call."""

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        self.asked.extend(questions)
        self.calls.append((threading.current_thread().name, len(questions)))
        return [self._reply(question) for question in questions]

    def _reply(self, question: Question) -> Reply:
        said = self.says(question)
        cost = {"calls": 1.0, "seconds": 0.5}
        if isinstance(said, Reply):
            return said
        return Reply(said, cost=cost) if isinstance(said, str) else Reply(top=said, cost=cost)
