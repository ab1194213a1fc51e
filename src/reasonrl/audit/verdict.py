"""The verdict on a judge: what its audit found, a sentence each, and which of it speaks against paying for it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from reasonrl.audit.exam import Audit, Plan, Scored, exceeds, measure
from reasonrl.audit.statistics import Agreement, Figure
from reasonrl.doctor import Finding
from reasonrl.interfaces import Judge


def examine(judge: Judge, plan: Plan | None = None, *, quiet: bool = True) -> Audit:
    """Returns the audit of a judge with its findings: what `reasonrl judge audit` prints.

        examine(SceneSemantic(), Plan(num=12)).ok

    Raises JudgeError or ContractError where the judge fails, DataError for labels that cannot be read.
    """
    plan = plan or Plan()
    audit = measure(judge, plan, quiet=quiet)
    return evolve(audit, findings=tuple(_findings(audit, plan)))


def formula(against: tuple[str, ...]) -> str:
    """Returns the exact reward of these aspects as it is written: "prompt-image × (semantic + spatial)"."""
    plan = " + ".join(name for name in ("semantic", "spatial") if name in against)
    factors = [
        "prompt-image" if "prompt-image" in against else "",
        f"({plan})" if "+" in plan and len(against) > 2 else plan,
        "reasoning-image" if "reasoning-image" in against else "",
    ]
    return " × ".join(filter(None, factors))


def _findings(audit: Audit, plan: Plan) -> Iterator[Finding]:
    rewards = [name for name in audit.about["rewards"] if name in audit.scores]
    for name in rewards:
        found = audit.scores[name]
        yield _agreement(f"{name} against exact {formula(found.against)}", found.overall, plan)
    for name in audit.about["rewards"]:
        if name in audit.people:
            yield _agreement(f"{name} against people", audit.people[name], plan)
    if audit.unscored is not None:
        yield _unscored("graded scenes", audit.unscored, audit, plan)
    if audit.unscored_labels is not None:
        yield _unscored("labels", audit.unscored_labels, audit, plan)
    if audit.cost.retest_hits:
        yield Finding(
            True,
            f"{audit.cost.retest_hits:.0f} answers of the second asking came from a cache: what differs between two"
            " askings is not to be seen, audit without the cache for that",
        )
    for name in rewards:
        yield from _order(name, audit.scores[name], plan)
    if audit.scores:
        yield _attacks(audit)
        if any(found.padding.value is not None for found in audit.scores.values()):
            yield _padding(audit, plan)


def _agreement(what: str, found: Agreement, plan: Plan) -> Finding:
    within = found.within_tau
    held, where = (within, "within prompts") if within.value is not None else (found.kendall, "over all pairs")
    wanted = "" if plan.threshold is None else f", at least {plan.threshold:g} wanted"
    if found.kendall.value is None or held.value is None:
        return Finding(False, f"{what}: no agreement is defined, {_why(found)}{wanted}")
    if found.tied_groups == 1:
        return Finding(False, f"{what}: says the same of every member of a group, so it teaches nothing{wanted}")
    enough = plan.threshold is None or held.value >= plan.threshold
    return Finding(enough, f"{what}: Kendall's tau {where} is {held}{wanted}")


def _why(found: Agreement) -> str:
    return "nothing was scored" if not found.n else "one of the two is the same everywhere"


def _unscored(what: str, share: float, audit: Audit, plan: Plan) -> Finding:
    why = "; ".join(f"{reason} ({times}x)" for reason, times in list(audit.reasons.items())[:3])
    return Finding(
        share <= plan.max_unscored,
        f"{share:.0%} of {what} have no reward, at most {plan.max_unscored:.0%} allowed{': ' * bool(why)}{why}",
    )


def _order(name: str, found: Scored, plan: Plan) -> Iterator[Finding]:
    if found.order is None or not found.overall.n:  # nothing scored is a finding of its own
        return
    allowed = found.allowed(plan.tolerance)
    if found.order.excess.value is None:
        yield Finding(False, f"{name}: nothing was scored in both orders, so nothing is known of order")
        return
    yield Finding(
        not exceeds(found.order.excess, allowed),
        f"{name}: moving members of a group changes a score by {found.order.excess} more than asking twice, at most"
        f" {allowed:.2g} allowed; from last place to first it gains {found.order.to_front}",
    )


def _attacks(audit: Audit) -> Finding:
    lifts = [(lift, family, name) for name, found in audit.scores.items() for family, lift in found.attacks.items()]
    bad = [each for each in lifts if not each[0].ok]
    if bad:
        said = "; ".join(f"{name} by {_gain(lift.against_neutral)} ({family})" for lift, family, name in bad[:4])
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return Finding(False, f"hostile text in the plan raises {said}{more}")
    gains = [(_least(lift.against_clean, lift.against_neutral), family, name) for lift, family, name in lifts]
    known = [(gain, family, name) for gain, family, name in gains if gain is not None]
    if not known:
        return Finding(False, "hostile text: no attacked plan was scored, so nothing is known")
    most, family, name = max(known)
    return Finding(
        True,
        f"hostile text in the plan raises no score beyond tolerance and chance; most: {name} by {most:+.3f} ({family})",
    )


def _gain(figure: Figure) -> str:
    return "?" if figure.value is None else signed(figure.value)


def signed(value: float) -> str:
    """Returns a change with its sign: two decimals, or one digit where those would be zeros."""
    return f"{value:+.2f}" if abs(value) >= 0.005 or abs(value) < 1e-9 else f"{value:+.0e}"


def _least(*figures: Figure) -> float | None:
    values = [figure.value for figure in figures if figure.value is not None]
    return min(values) if len(values) == len(figures) else None


def _padding(audit: Audit, plan: Plan) -> Finding:
    bad = {
        name: found.padding
        for name, found in audit.scores.items()
        if exceeds(found.padding, found.allowed(plan.tolerance))
    }
    if bad:
        return Finding(False, f"text that says nothing raises {'; '.join(f'{n} by {f}' for n, f in bad.items())}")
    return Finding(True, "text that says nothing raises no score beyond tolerance")
