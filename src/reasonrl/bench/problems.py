"""What the log-prob operators are asked, and the float64 answer: inputs made from a seed, targets drawn from them."""

from __future__ import annotations

from typing import Literal

import torch
from attrs import field, frozen
from torch import Tensor

Table = Literal["logits", "linear", "guidance"]
PROBES = 64
"""Rows, and words, whose gradient is compared."""
CFG_WEIGHT = 5.0
_BLOCK = 512


@frozen
class Shape:
    """One size of one table."""

    table: Table
    rows: int
    vocab: int
    width: int
    """H; 0 for logits."""
    spread: float = 3.0
    """Standard deviation of the logits: 3 is 5.6 nats of entropy at V = 16,384."""
    seed: int = 0

    @property
    def label(self) -> str:
        """N, V and H, as the tables say them."""
        size = f"N={self.rows} V={self.vocab}"
        return f"{size} H={self.width}" if self.width else size


@frozen(eq=False)
class Problem:
    """Operands in bfloat16; under guidance `uncond` beside them. `logits` has a row more than is asked for."""

    target: Tensor
    slopes: Tensor
    """(N,) the gradient of each log-prob."""
    logits: Tensor | None = None
    hidden: Tensor | None = None
    uncond: Tensor | None = None
    weight: Tensor | None = None

    @property
    def operands(self) -> list[Tensor]:
        """What a gradient is wanted for, those of a row first."""
        found = (self.logits, self.hidden, self.uncond, self.weight)
        return [value for value in found if value is not None]


@frozen(eq=False)
class Answer:
    """The float64 log-probs (N,), and gradients of a few rows and a few words."""

    log_prob: Tensor
    rows: Tensor
    of_rows: Tensor
    words: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))
    of_words: Tensor = field(factory=lambda: torch.empty(0))


def operands(shape: Shape, device: torch.device) -> Problem:
    """Returns the problem without its targets, the same for a seed and device."""
    noise = torch.Generator(device).manual_seed(shape.seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        for part in made.split(4096):  # never a second copy of it in float32
            part.copy_(torch.randn(part.shape, generator=noise, device=device).mul_(scale))
        return made

    target = torch.zeros(shape.rows, dtype=torch.int64, device=device)
    slopes = torch.randn(shape.rows, generator=noise, device=device) / shape.rows
    if shape.table == "logits":
        return Problem(target, slopes, logits=normal(shape.rows + 1, shape.vocab, scale=shape.spread))
    hidden = normal(shape.rows, shape.width)
    weight = normal(shape.vocab, shape.width, scale=shape.spread / shape.width**0.5)
    if shape.table == "linear":
        return Problem(target, slopes, hidden=hidden, weight=weight)
    # Branches of one prompt are alike: correlation 0.9, so that w = 5 stays a distribution and not one word.
    uncond = (0.9 * hidden.float() + 0.19**0.5 * normal(shape.rows, shape.width).float()).bfloat16()
    return Problem(target, slopes, hidden=hidden, uncond=uncond, weight=weight)


def solved(shape: Shape, problem: Problem) -> tuple[Tensor, Answer]:
    """Returns targets drawn from the problem's own distribution, and its answer, all in float64."""
    device = problem.target.device
    noise = torch.Generator(device).manual_seed(shape.seed + 1)
    num_rows = shape.rows
    rows = torch.linspace(0, num_rows - 1, min(PROBES, num_rows), device=device).long()
    words = torch.linspace(0, shape.vocab - 1, PROBES, device=device).long()
    weight = None if problem.weight is None else problem.weight.double()
    target, log_prob = problem.target.clone(), torch.empty(num_rows, dtype=torch.float64, device=device)
    at_words = torch.empty(num_rows, PROBES, dtype=torch.float64, device=device)
    for start in range(0, num_rows, _BLOCK):
        part = slice(start, min(start + _BLOCK, num_rows))
        probs = _log_probs(problem, part, weight)
        at_words[part] = probs[:, words]
        # A Gumbel's argmax: multinomial stops at 2**24 words.
        gumbel = -torch.empty(probs.shape, device=device).exponential_(generator=noise).log_()
        target[part] = (gumbel + probs).argmax(1)
        log_prob[part] = probs.gather(1, target[part, None]).squeeze(1)
    slopes = problem.slopes.double()
    probed = torch.cat([_log_probs(problem, slice(r, r + 1), weight) for r in rows.tolist()])
    of_logits = _slope(probed, target[rows], slopes[rows], torch.arange(shape.vocab, device=device))
    if weight is None:
        return target, Answer(log_prob, rows, of_logits)
    hidden = _states(problem, slice(None))
    of_words = _slope(at_words, target, slopes, words).T @ hidden
    return target, Answer(log_prob, rows, of_logits @ weight, words, of_words)


def _states(problem: Problem, part: slice) -> Tensor:
    assert problem.hidden is not None
    states = problem.hidden[part].double()
    if problem.uncond is None:
        return states
    uncond = problem.uncond[part].double()
    return uncond + CFG_WEIGHT * (states - uncond)


def _log_probs(problem: Problem, part: slice, weight: Tensor | None) -> Tensor:
    if problem.logits is not None:
        return problem.logits[part].double().log_softmax(1)
    assert weight is not None
    return (_states(problem, part) @ weight.T).log_softmax(1)


def _slope(log_probs: Tensor, target: Tensor, slopes: Tensor, words: Tensor) -> Tensor:
    """Returns g (1[j = y] − p_j) for the given words."""
    return slopes[:, None] * ((words == target[:, None]).double() - log_probs.exp())
