"""Advantages of groups and the clipped policy loss, on the backend of their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.kernels import checks, reference
from reasonrl.kernels.backend import Backend, uses_triton
from reasonrl.kernels.reference import Aggregate, Baseline, Divergence, Ratio, Scale


class PolicyLoss(NamedTuple):
    """A loss to differentiate, and sums over the trained actions without gradient: divide by mask.sum()."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """surrogate, ratio, clip_low, clip_high; kl with a reference; entropy if given."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    scored: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    per_reward_norm: bool = False,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    tolerance: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns (M,) float32 advantages and (M,) bool: takes part. Mathematics: `reference.group_advantages`.

    `groups`: (M,) labels, or the size of consecutive groups. rewards: (M,), or (M, K) of K rewards that are summed
    with `weights` (K,); `per_reward_norm` normalises each before the sum (GDPO, arXiv 2601.05242). A reward that is
    nan or infinite counts as not scored. Raises ContractError.

    >>> group_advantages(torch.tensor([0.0, 1.0, 3.0, 3.0]), 2, scale="none")[0].tolist()
    [-0.5, 0.5, 0.0, 0.0]
    """
    if rewards.dim() not in (1, 2):
        raise ContractError(f"rewards must be (M,) or (M, K), got {tuple(rewards.shape)}")
    if isinstance(groups, int):
        if groups < 1 or len(rewards) % groups:
            raise ContractError(f"{len(rewards)} rewards do not make whole groups of {groups}: give labels instead")
        groups = torch.arange(len(rewards), device=rewards.device) // groups
    for name, said, allowed in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        _one_of(name, said, allowed)
    checks.same_shape("groups", groups, rewards.shape[:1], of="rewards")
    checks.same_shape("scored", scored, rewards.shape[:1], of="rewards")
    columns = rewards[:, None] if rewards.dim() == 1 else rewards
    checks.same_shape("weights", weights, columns.shape[1:], of="rewards (M, K)")
    real = columns.isfinite().all(1)
    scored = real if scored is None else scored & real
    # A product with 0 would keep a nan.
    columns = torch.where(scored[:, None], columns.double(), 0.0)
    share = columns.new_ones(columns.shape[1]) if weights is None else weights.to(columns)
    how: dict[str, Any] = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": eps, "tolerance": tolerance}
    compute: Callable[..., tuple[Tensor, Tensor]] = reference.group_advantages
    if uses_triton(backend, rewards):
        from reasonrl.kernels import triton_policy

        compute = triton_policy.group_advantages
    if not per_reward_norm:
        return compute((columns * share).sum(1), groups, scored, **how)
    found = [compute(column, groups, scored, **how) for column in columns.unbind(1)]
    total = sum((a * w for (a, _), w in zip(found, share.float(), strict=True)), torch.zeros_like(found[0][0]))
    return total, found[0][1]


def masked_aggregate(values: Tensor, mask: Tensor, agg: Aggregate, denominator: float | Tensor | None = None) -> Tensor:
    """Returns one number of (N, T) values; see `reference.masked_aggregate`. Raises ContractError."""
    _one_of("agg", agg, Aggregate)
    checks.masks(mask, values.shape, of="values")
    return reference.masked_aggregate(values, mask, agg, denominator)


def policy_loss(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_log_prob: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: Divergence = "k3",
    entropy_coef: float = 0.0,
    ratio: Ratio = "token",
    agg: Aggregate = "token_mean",
    denominator: float | Tensor | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    """Returns the clipped surrogate + kl_coef · KL − entropy_coef · entropy of (N, T) actions, aggregated.

    advantages: (N,) or (N, T). `clip` = (ε below, ε above); mathematics: `reference.policy_terms` and
    `reference.masked_aggregate`. Only log_prob and entropy are differentiated. Raises ContractError.
    """
    given = {"old": old, "reference_log_prob": reference_log_prob, "entropy": entropy}
    checks.floats(log_prob=log_prob, advantages=advantages, **given)
    if log_prob.dim() != 2:
        raise ContractError(f"log_prob must be (N, T), got {tuple(log_prob.shape)}")
    for name, value in given.items():
        checks.same_shape(name, value, log_prob.shape, of="log_prob")
    if advantages.shape not in (log_prob.shape, log_prob.shape[:1]):
        raise ContractError(
            f"advantages must be (N,) or (N, T) of {tuple(log_prob.shape)}, got {tuple(advantages.shape)}"
        )
    checks.masks(mask, log_prob.shape, of="log_prob")
    for name, said, allowed in (("agg", agg, Aggregate), ("kl", kl, Divergence), ("ratio", ratio, Ratio)):
        _one_of(name, said, allowed)
    triton = uses_triton(backend, log_prob)
    if triton and backend == "triton" and log_prob.dtype == torch.float64:
        raise ContractError("backend='triton' computes in float32, got float64: cast, or backend='torch'")
    log_prob, old, advantages = _wide(log_prob), _wide(old.detach()), _wide(advantages.detach())
    entropy = None if entropy is None else _wide(entropy)
    anchor = None if reference_log_prob is None else _wide(reference_log_prob.detach())
    if triton and log_prob.dtype != torch.float64:
        loss, sums = _triton_terms(
            log_prob, old, advantages, mask, anchor, entropy, clip, dual_clip, kl_coef, kl, entropy_coef, ratio
        )
    else:
        terms = reference.policy_terms(
            log_prob, old, advantages, mask, reference=anchor, entropy=entropy, clip=clip, dual_clip=dual_clip,
            kl_coef=kl_coef, kl=kl, entropy_coef=entropy_coef, ratio=ratio,
        )  # fmt: skip
        loss = terms.pop("loss")
        sums = {name: value.detach().sum() for name, value in terms.items()}
    if entropy is not None:
        sums["entropy"] = torch.where(mask, entropy.detach(), 0.0).sum()
    return PolicyLoss(reference.masked_aggregate(loss, mask, agg, denominator), sums)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _one_of(name: str, said: object, allowed: object) -> None:
    choices = allowed.__args__  # type: ignore[attr-defined]
    if said not in choices:
        raise ContractError(f"{name} must be one of {', '.join(choices)}, got {said!r}")


def _triton_terms(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    anchor: Tensor | None,
    entropy: Tensor | None,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float,
    kl: Literal["k1", "k2", "k3"],
    entropy_coef: float,
    ratio: Ratio,
) -> tuple[Tensor, dict[str, Tensor]]:
    plain = [None if v is None else v.float().contiguous() for v in (log_prob, old, advantages, anchor, entropy)]
    loss, _, sums = _policy_terms_op(
        plain[0], plain[1], plain[2], mask.contiguous(), plain[3], plain[4], *clip, dual_clip, kl_coef, kl,
        entropy_coef, ratio == "sequence",
    )  # fmt: skip
    names = ["surrogate", "ratio", "clip_low", "clip_high"] + (["kl"] if anchor is not None else [])
    return loss, dict(zip(names, sums.detach().sum(0).unbind(), strict=False))


@torch.library.custom_op("reasonrl::policy_terms", mutates_args=())
def _policy_terms_op(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    anchor: Tensor | None,
    entropy: Tensor | None,
    low: float,
    high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl: str,
    entropy_coef: float,
    sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from reasonrl.kernels.triton_policy import policy_terms

    return policy_terms(
        log_prob, old, advantages, mask, anchor, entropy, low, high, dual_clip, kl_coef, kl, entropy_coef, sequence
    )


@_policy_terms_op.register_fake
def _(log_prob, old, advantages, mask, anchor, entropy, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(log_prob), torch.empty_like(log_prob), log_prob.new_empty(log_prob.shape[0], 5)


def _policy_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.entropy_coef = inputs[11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], output[1], inputs[3])


def _policy_gradients(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    log_prob, slope, mask = ctx.saved_tensors
    to_log_prob, to_entropy = _policy_terms_backward(grad_loss.contiguous(), log_prob, slope, mask, ctx.entropy_coef)
    needed = ctx.needs_input_grad[5]
    return to_log_prob, None, None, None, None, to_entropy if needed else None, *(None,) * 7


@torch.library.custom_op("reasonrl::policy_terms_backward", mutates_args=())
def _policy_terms_backward(
    grad_loss: Tensor, log_prob: Tensor, slope: Tensor, mask: Tensor, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    # An operator without a gradient: slope depends on log_prob, so a second gradient comes by here, and raises.
    return grad_loss * slope, torch.where(mask, -entropy_coef * grad_loss, 0.0)


@_policy_terms_backward.register_fake
def _(grad_loss, log_prob, slope, mask, entropy_coef):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad_loss), torch.empty_like(grad_loss)


_policy_terms_op.register_autograd(_policy_gradients, setup_context=_policy_setup)
