"""The values that travel between the four interfaces. Read this first, then `interfaces/`, then `loop.py`.

Axis letters: N rows (trajectories), M draws of a claim, T actions, K terms, D width.
Log-probs are natural logs in float32. Absence is None, never 0.0.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import Factory, evolve, field, frozen

from reasonrl.errors import ContractError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Member = tuple[int, ...]
"""Path of a draw under its prompt: (plan,), (plan, image). A parent is the path less its last index."""

EVERY = "*"
"""The stage of a reward that counts wherever no stage-specific one is given."""

FAULT = "fault"
"""The artifact that says why a trajectory stopped with `Stop.FAULT`."""


class Stop(enum.StrEnum):
    """Why a trajectory ended."""

    END = "end"
    """It finished by itself."""
    LENGTH = "length"
    """Its reasoning ran out of tokens and was cut."""
    FAULT = "fault"
    """It could not be drawn, by nobody's merit (latents that are not finite): it is left unscored."""


@frozen
class Prompt:
    """What to draw, and what a judge may know about it; ids are distinct within a step."""

    id: str
    text: str
    facts: Mapping[str, Any] = Factory(dict)
    image: Image | None = None


@frozen(eq=False)
class Segment:
    """T actions of one draw of one stage; trajectories that branch later share it."""

    stage: str
    member: Member
    actions: Tensor
    """(T,) int64 ids, (T, D) vectors or (T, C, H, W) latents; recorded steps only."""
    mask: Tensor
    """(T,) bool: trained. False = forced. Every action listed exists."""
    log_probs: Tensor | None = None
    """(T,) float32 nats of what replay returns, as sampled; None = not a likelihood (ODE, data, masked)."""
    context: Mapping[str, Tensor] = Factory(dict)
    """What replay needs besides the actions, unpadded."""
    behaviour: Tensor | None = None
    """(T,) float32 nats of what drew the actions, where that is not what replay returns; None = it is."""

    def __attrs_post_init__(self) -> None:
        given = {"actions": self.actions, "mask": self.mask, "log_probs": self.log_probs, "behaviour": self.behaviour}
        lengths = {name: len(value) for name, value in given.items() if value is not None}
        if len(set(lengths.values())) > 1:
            raise ContractError(f"segment {self.stage!r} has {lengths}: all of them need one length")


@frozen(eq=False)
class Trajectory:
    """One leaf: a prompt, its draws in order, and what they decode to, by stage."""

    prompt: Prompt
    member: Member = ()
    segments: Mapping[str, Segment] = Factory(dict)
    texts: Mapping[str, str] = Factory(dict)
    images: Mapping[str, Image] = Factory(dict)
    artifacts: Mapping[str, Any] = Factory(dict)
    stop: Stop = Stop.END

    @property
    def reasoning(self) -> str | None:
        """The last text, or None."""
        return list(self.texts.values())[-1] if self.texts else None

    @property
    def plan(self) -> Any:
        """The last text read as a `Plan`, or None where there is no text."""
        from reasonrl.plan import Plan  # plan is beside types in the import order

        return None if self.reasoning is None else Plan.parse(self.reasoning)

    @property
    def image(self) -> Image | None:
        """The last image, or None."""
        return list(self.images.values())[-1] if self.images else None

    def shown(self) -> Trajectory:
        """Returns it without segments: what travels to a judge."""
        return evolve(self, segments={})


@frozen
class Score:
    """A value, or None with the reason; `bool(score)` raises because 0.0 and None are different."""

    value: float | None
    note: str = ""
    """Why there is no value, or what is special about it: "reason: particulars". Metrics count a None by its reason."""
    cost: Mapping[str, float] = field(factory=dict, eq=False)
    """What it took: "calls", "tokens_in", "tokens_out", "seconds", "retries", "hits" of a cache. Empty = nothing."""

    def __bool__(self) -> bool:
        raise ContractError(f"bool({self!r}) is ambiguous: write `score.value is None` or `score.value > 0`")


@frozen
class Term:
    """One summand of a stage's reward."""

    name: str
    value: float | None
    weight: float = 1.0


@frozen
class Verdict:
    """Summands by stage (or EVERY), and the raw scores behind them."""

    terms: Mapping[str, tuple[Term, ...]]
    scores: Mapping[str, Score] = Factory(dict)

    def on(self, stage: str) -> tuple[Term, ...] | None:
        """Returns the stage's summands, else EVERY's; None = says nothing there."""
        return self.terms.get(stage, self.terms.get(EVERY))

    def total(self, stage: str = EVERY) -> float | None:
        """Returns the weighted sum at a stage; None where a summand is unscored or nothing is said."""
        terms = self.on(stage)
        if terms is None or any(term.value is None for term in terms):
            return None
        return sum(term.weight * term.value for term in terms if term.value is not None)

    @classmethod
    def of(cls, name: str, value: float | Score | None) -> Verdict:
        """Returns a verdict of one term on EVERY."""
        score = value if isinstance(value, Score) else Score(value)
        return cls({EVERY: (Term(name, score.value),)}, {name: score})


@frozen(eq=False)
class Rewards:
    """K terms of the M draws of one claim: the whole step, all ranks."""

    names: tuple[str, ...]
    values: Tensor
    """(K, M) float64; 0 where unscored."""
    scored: Tensor
    """(K, M) bool."""
    weights: Tensor
    """(K,) float64."""
    groups: Tensor
    """(M,) int64; equal numbers share a baseline."""

    @property
    def total(self) -> Tensor:
        """(M,) float64: the weighted sum of the terms."""
        return self.weights @ self.values

    @property
    def complete(self) -> Tensor:
        """(M,) bool: every term was scored."""
        return self.scored.all(0)


@frozen(eq=False)
class Stage:
    """N draws of one stage, padded to T."""

    name: str
    keys: tuple[tuple[str, Member], ...]
    """(prompt id, member) of each row: the address of noise drawn while training."""
    actions: Tensor
    """(N, T, ...)."""
    present: Tensor
    """(N, T) bool: the action exists and may be attended to."""
    mask: Tensor
    """(N, T) bool: the action is trained; within `present`."""
    advantages: Tensor
    """(N,) float32."""
    groups: Tensor
    """(N,) int64."""
    log_probs: Tensor | None = None
    """(N, T) float32 as sampled, 0 where absent; None = not a likelihood."""
    context: Mapping[str, Any] = Factory(dict)
    """N tensors a name, unpadded."""
    behaviour: Tensor | None = None
    """(N, T) float32 of what drew the actions, where that is not what replay returns; None = it is."""


@frozen(eq=False)
class Batch:
    """N trajectories and all stages of one trainable; rows correspond."""

    trajectories: tuple[Trajectory, ...]
    stages: Mapping[str, Stage]

    def with_context(self, stage: str, **tensors: Tensor) -> Batch:
        """Returns a batch whose stage also sees these live tensors."""
        old = self.stages[stage]
        new = evolve(old, context={**old.context, **tensors})
        return evolve(self, stages={**self.stages, stage: new})


@frozen(eq=False)
class Replay:
    """What the current weights say of a stage's actions."""

    log_probs: Tensor | None = None
    """(N, T) float32 nats, exact where the stage's mask is True."""
    entropy: Tensor | None = None
    """(N, T) float32 nats."""
    extras: Mapping[str, Tensor] = Factory(dict)


@frozen(eq=False)
class Loss:
    """A sum over actions (never a mean), and metrics that are sums too."""

    total: Tensor
    metrics: Mapping[str, Tensor] = field(factory=dict)
