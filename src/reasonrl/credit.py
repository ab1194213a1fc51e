"""Verdicts of all ranks to advantages by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from reasonrl.batch import Claim, Row
from reasonrl.errors import ContractError
from reasonrl.recipe import Recipe
from reasonrl.types import Member, Rewards, Term, Trajectory, Verdict

Address = tuple[str, Member]
Gather = Callable[[list[Any]], list[Any]]


@frozen
class _Draw:
    """One draw of a claim, with the mean of its scored leaves term by term."""

    prompt_id: str
    member: Member
    terms: tuple[Term, ...] | None


def credit(
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    recipe: Recipe,
    *,
    gather: Gather,
) -> list[Row]:
    """Returns one row a trajectory: advantages and groups by stage, and the stages it trains.

    Advantages see the rewards of every rank. A draw that several trajectories share (a plan drawn k times)
    is rewarded by the mean of its scored leaves and trained once.
    """
    shares = {claim: _shares(claim, trajectories, verdicts, recipe, gather) for claim in recipe.claims}
    seen: set[tuple[str, Address]] = set()
    return [_row(trajectory, shares, seen) for trajectory in trajectories]


def _row(
    trajectory: Trajectory,
    shares: Mapping[Claim, Mapping[Address, tuple[float, int, bool]]],
    seen: set[tuple[str, Address]],
) -> Row:
    advantages: dict[str, float] = {}
    groups: dict[str, int] = {}
    trained: set[str] = set()
    for claim, by_address in shares.items():
        owner = _address(trajectory, claim)
        if owner is None:
            continue
        advantage, group, takes_part = by_address[owner]
        for stage in claim:
            if stage not in trajectory.segments:
                continue
            advantages[stage], groups[stage] = advantage, group
            mine = (stage, (trajectory.prompt.id, trajectory.segments[stage].member))
            if takes_part and mine not in seen:
                trained.add(stage)
                seen.add(mine)
    return Row(trajectory, advantages, groups, frozenset(trained))


def _address(trajectory: Trajectory, claim: Claim) -> Address | None:
    members = [trajectory.segments[s].member for s in claim if s in trajectory.segments]
    return (trajectory.prompt.id, max(members, key=len)) if members else None


def _shares(
    claim: Claim,
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    recipe: Recipe,
    gather: Gather,
) -> dict[Address, tuple[float, int, bool]]:
    draws: list[_Draw] = gather(_draws(claim, trajectories, verdicts))
    labels: dict[object, int] = {}
    groups = [labels.setdefault(recipe.group_of(d.prompt_id, d.member), len(labels)) for d in draws]
    advantages, takes_part = recipe.claims[claim].advantages(to_rewards(draws, groups))
    return {
        (d.prompt_id, d.member): (float(a), g, bool(p))
        for d, a, g, p in zip(draws, advantages.tolist(), groups, takes_part.tolist(), strict=True)
    }


def _draws(claim: Claim, trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> list[_Draw]:
    leaves: dict[Address, list[tuple[Term, ...] | None]] = {}
    for trajectory, verdict in zip(trajectories, verdicts, strict=True):
        address = _address(trajectory, claim)
        if address is not None:
            leaves.setdefault(address, []).append(_said(verdict, claim))
    return [_Draw(*address, _mean(terms)) for address, terms in leaves.items()]


def _said(verdict: Verdict, claim: Claim) -> tuple[Term, ...] | None:
    said = [terms for stage in claim if (terms := verdict.on(stage)) is not None]
    # A term on EVERY is one term, not one a stage: the stages show the same object.
    return tuple({id(term): term for terms in said for term in terms}.values()) if said else None


def _mean(leaves: Sequence[tuple[Term, ...] | None]) -> tuple[Term, ...] | None:
    said = [terms for terms in leaves if terms is not None]
    if not said:
        return None
    _same_terms(said)
    means = []
    for column in zip(*said, strict=True):
        values = [term.value for term in column if term.value is not None]
        value = sum(values) / len(values) if values else None
        means.append(Term(column[0].name, value, column[0].weight))
    return tuple(means)


def _same_terms(said: Sequence[tuple[Term, ...]]) -> None:
    kinds = {tuple((term.name, term.weight) for term in terms) for terms in said}
    if len(kinds) > 1:
        raise ContractError(f"verdicts of one step have different terms: {sorted(kinds)}; give each the same terms")


def to_rewards(draws: Sequence[_Draw], groups: Sequence[int]) -> Rewards:
    """Returns the (K, M) rewards of M draws; a draw nobody spoke of is unscored in every term."""
    said = [draw.terms for draw in draws if draw.terms is not None]
    _same_terms(said or [()])
    terms = said[0] if said else (Term("silence", None),)  # nobody spoke: unscored, not complete for want of terms
    nobody = tuple(Term(term.name, None, term.weight) for term in terms)
    table = [draw.terms if draw.terms is not None else nobody for draw in draws]
    values = [[row[k].value for row in table] for k in range(len(terms))]
    shape = (len(terms), len(draws))
    return Rewards(
        names=tuple(term.name for term in terms),
        values=torch.tensor([[v or 0.0 for v in row] for row in values], dtype=torch.float64).reshape(shape),
        scored=torch.tensor([[v is not None for v in row] for row in values], dtype=torch.bool).reshape(shape),
        weights=torch.tensor([term.weight for term in terms], dtype=torch.float64),
        groups=torch.tensor(groups, dtype=torch.int64),
    )
