"""Judge: scores finished trajectories; and the reward algebra behind `+`, `*`, `.on` and `.named`.

    PromptImage() * (Semantic() + Spatial()) * ReasoningImage()      # GoT-R1's reward, literally
    Semantic().on("reasoning") + PromptImage().on("image")           # credit by stage

Meaning of an expression at a stage: judges that are not on it drop out, the rest is evaluated.
Unscored is not zero: a sum with an unscored summand is unscored. But 0 × unscored = 0: a closed gate
needs no second opinion. The policy's fault is a 0, the judge's fault is None.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

from attrs import field, frozen

from reasonrl.errors import ConfigError, ContractError
from reasonrl.types import EVERY, Score, Term, Verdict

if TYPE_CHECKING:
    from reasonrl.types import Trajectory


class Judge(ABC):
    """Scores trajectories. `a + b`, `a * b`, `0.5 * a`, `a.on(stage)` and `a.named(name)` are judges."""

    @property
    def needs(self) -> frozenset[str]:
        """Artifacts it reads, each provided by the policy or the renderer ("image", ...)."""
        return frozenset()

    @property
    def stages(self) -> frozenset[str]:
        """The stages its verdicts speak of; EVERY = wherever nothing more specific is said."""
        return frozenset({EVERY})

    @abstractmethod
    def judge(self, trajectories: Sequence[Trajectory]) -> Sequence[Verdict]:
        """Returns one verdict each, in order, with the same terms each; groups arrive whole.

        Unable to score: a term whose value is None, and a score whose note says why.
        """

    @final
    def on(self, stage: str) -> Judge:
        """Returns this judge with its say restricted to one stage."""
        return On(self, stage)

    @final
    def named(self, name: str) -> Judge:
        """Returns this judge with its scores and terms under another name."""
        return Named(self, name)

    @final
    def __add__(self, other: Judge) -> Judge:
        return Sum(_flat(Sum, self, other)) if isinstance(other, Judge) else NotImplemented

    @final
    def __mul__(self, other: Judge | float) -> Judge:
        if isinstance(other, Judge):
            return Product(_flat(Product, self, other))
        return Scaled(self, float(other)) if isinstance(other, int | float) else NotImplemented

    @final
    def __rmul__(self, other: float) -> Judge:
        return Scaled(self, float(other)) if isinstance(other, int | float) else NotImplemented


class PointwiseJudge(Judge):
    """A judge of one trajectory at a time: write `score`, and the rest follows."""

    @property
    def name(self) -> str:
        """The name of its score."""
        return type(self).__name__

    @abstractmethod
    def score(self, trajectory: Trajectory) -> float | Score | None:
        """Scores one trajectory; None (or a Score with a note) abstains."""

    @final
    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Scores each; no plan or no image is a 0, the policy's fault, and any other missing need is unscored."""
        return [Verdict.of(self.name, self._guarded(trajectory)) for trajectory in trajectories]

    def _guarded(self, trajectory: Trajectory) -> Score:
        missing = sorted(need for need in self.needs if not _has(trajectory, need))
        if missing:
            owed = [need for need in missing if need in POLICYS_DUTY]
            return Score(0.0 if owed else None, f"no {', '.join(owed or missing)}")
        return finite(self.score(trajectory))


POLICYS_DUTY = frozenset({"image", "plan", "reasoning"})
"""What a policy owes with every trajectory: where it is missing, the score is 0 and not silence."""


def finite(value: float | Score | None) -> Score:
    """Returns a Score whose value is a finite float or None: NaN and infinity are the judge's fault."""
    score = value if isinstance(value, Score) else Score(value)
    if score.value is None:
        return score
    number = float(score.value)
    if math.isfinite(number):
        return Score(number, score.note, score.cost)
    return Score(None, f"not finite: {number}", score.cost)


def _has(trajectory: Trajectory, need: str) -> bool:
    known = {"image": trajectory.image, "reasoning": trajectory.reasoning, "plan": trajectory.texts}
    return bool(known[need]) if need in known else need in trajectory.artifacts


def _flat(kind: type[Sum] | type[Product], *judges: Judge) -> tuple[Judge, ...]:
    return tuple(part for judge in judges for part in (judge.parts if isinstance(judge, kind) else (judge,)))


def _judges(value: Iterable[Judge]) -> tuple[Judge, ...]:
    parts = tuple(value)
    wrong = [type(part).__name__ for part in parts if not isinstance(part, Judge)]
    if wrong or not parts:
        raise ConfigError(f"a sum or product of judges needs judges, got {wrong or 'nothing'}")
    return parts


@final
@frozen
class Sum(Judge):
    """The summands of all parts, at each stage that any part speaks of."""

    parts: tuple[Judge, ...] = field(converter=_judges)

    @property
    def needs(self) -> frozenset[str]:
        """What any part needs."""
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def stages(self) -> frozenset[str]:
        """What any part speaks of."""
        return frozenset().union(*(part.stages for part in self.parts))

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the concatenated summands; a name used twice raises ContractError."""
        return _combine(self.parts, trajectories, lambda parts: sum(parts, ()))


@final
@frozen
class Product(Judge):
    """One term a stage: the product of the parts' totals there, with 0 × unscored = 0."""

    parts: tuple[Judge, ...] = field(converter=_judges)

    @property
    def needs(self) -> frozenset[str]:
        """What any part needs."""
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def stages(self) -> frozenset[str]:
        """What any part speaks of."""
        return frozenset().union(*(part.stages for part in self.parts))

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the products; a score name used twice raises ContractError."""
        return _combine(self.parts, trajectories, lambda parts: (_product(parts),))


@final
@frozen
class Scaled(Judge):
    """A judge's terms with their weights multiplied by a factor."""

    part: Judge
    factor: float = field()

    @factor.validator
    def _finite(self, _: object, value: float) -> None:
        if not math.isfinite(value):
            raise ConfigError(f"a judge's weight must be finite, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """What the part needs."""
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        """What the part speaks of."""
        return self.part.stages

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the part's verdicts, reweighted, with 0 × unscored = 0; raw scores stay as they were."""
        return [with_terms(verdict, self._scaled) for verdict in self.part.judge(trajectories)]

    def _scaled(self, term: Term) -> Term:
        value = 0.0 if self.factor == 0 else term.value
        return Term(term.name, value, term.weight * self.factor)


@final
@frozen
class On(Judge):
    """A judge whose say is restricted to one stage."""

    part: Judge
    stage: str = field()

    @stage.validator
    def _spoken_of(self, _: object, value: str) -> None:
        if not {EVERY, value} & self.part.stages:
            raise ConfigError(
                f"{type(self.part).__name__} never speaks of stage {value!r}, only of {sorted(self.part.stages)}:"
                " restrict it to one of those"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the part needs."""
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        """The one stage."""
        return frozenset({self.stage})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the part's verdicts, speaking of the one stage only."""
        verdicts = self.part.judge(trajectories)
        said = [verdict.on(self.stage) for verdict in verdicts]
        return [
            Verdict({} if terms is None else {self.stage: terms}, verdict.scores)
            for verdict, terms in zip(verdicts, said, strict=True)
        ]


@final
@frozen
class Named(Judge):
    """A judge under another name, so that two of one class can stand in one expression."""

    part: Judge
    name: str

    @property
    def needs(self) -> frozenset[str]:
        """What the part needs."""
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        """What the part speaks of."""
        return self.part.stages

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns the part's verdicts, renamed; several names become `name.old`."""
        return [self._renamed(verdict) for verdict in self.part.judge(trajectories)]

    def _renamed(self, verdict: Verdict) -> Verdict:
        names = self._names(verdict.scores)
        called = self._names(term.name for terms in verdict.terms.values() for term in terms)
        renamed = with_terms(verdict, lambda term: Term(called[term.name], term.value, term.weight))
        return Verdict(renamed.terms, {names[old]: score for old, score in verdict.scores.items()})

    def _names(self, old: Iterable[str]) -> dict[str, str]:
        distinct = dict.fromkeys(old)
        return {name: self.name if len(distinct) == 1 else f"{self.name}.{name}" for name in distinct}


def with_terms(verdict: Verdict, change: Callable[[Term], Term]) -> Verdict:
    """Returns the verdict with each term changed; a term that several stages share stays one object."""
    shared = {id(term): term for terms in verdict.terms.values() for term in terms}
    changed = {key: change(term) for key, term in shared.items()}
    terms = {stage: tuple(changed[id(term)] for term in terms) for stage, terms in verdict.terms.items()}
    return Verdict(terms, verdict.scores)


def _product(parts: Sequence[tuple[Term, ...]]) -> Term:
    totals = [Verdict({EVERY: terms}).total() for terms in parts]
    sums = ["+".join(term.name for term in terms) for terms in parts]
    name = "*".join(f"({said})" if len(terms) > 1 else said for said, terms in zip(sums, parts, strict=True))
    if 0.0 in totals:
        return Term(name, 0.0)
    product = math.prod(t for t in totals if t is not None)
    return Term(name, None if None in totals or not math.isfinite(product) else product)


def _combine(
    parts: Sequence[Judge],
    trajectories: Sequence[Trajectory],
    fold: Callable[[Sequence[tuple[Term, ...]]], tuple[Term, ...]],
) -> list[Verdict]:
    columns = [checked(part, trajectories) for part in parts]
    return [_fold(row, fold) for row in zip(*columns, strict=True)]


def _fold(
    verdicts: Sequence[Verdict],
    fold: Callable[[Sequence[tuple[Term, ...]]], tuple[Term, ...]],
) -> Verdict:
    stages = dict.fromkeys(stage for verdict in verdicts for stage in verdict.terms)
    terms = {stage: fold([said for verdict in verdicts if (said := verdict.on(stage)) is not None]) for stage in stages}
    _refuse_twice(Counter(name for verdict in verdicts for name in verdict.scores))
    for stage_terms in terms.values():
        _refuse_twice(Counter(term.name for term in stage_terms))
    scores: Mapping[str, Score] = {k: s for verdict in verdicts for k, s in verdict.scores.items()}
    return Verdict(terms, scores)


def _refuse_twice(names: Counter[str]) -> None:
    twice = sorted(name for name, times in names.items() if times > 1)
    if twice:
        raise ContractError(
            f"two judges in one expression both score {', '.join(twice)}: rename one with .named('...')"
        )


def checked(judge: Judge, trajectories: Sequence[Trajectory]) -> list[Verdict]:
    """Returns the judge's verdicts; ContractError where they are not one Verdict each."""
    verdicts = list(judge.judge(trajectories))
    if len(verdicts) != len(trajectories):
        raise ContractError(
            f"{type(judge).__name__} returned {len(verdicts)} verdicts for {len(trajectories)} trajectories:"
            " judge() must return one each, in order"
        )
    wrong = sorted({type(verdict).__name__ for verdict in verdicts if not isinstance(verdict, Verdict)})
    if wrong:
        raise ContractError(
            f"{type(judge).__name__} returned {', '.join(wrong)} where verdicts belong:"
            " judge() returns Verdict.of(name, value), a PointwiseJudge's score() the value alone"
        )
    return verdicts
