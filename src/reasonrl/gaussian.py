"""Gaussian: log-densities, ratios and divergences of rows that are drawn from N(mean, std²), as denoising steps are.

Means are (N, ...), D numbers a row; std is () or one a row, (N, 1, ...). Results are (N,) in nats, reduced over a row's
D numbers by a stated choice, "mean" or "sum": `renderers.steps` says what each means for ratios and clip ranges.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import reduce as einops_reduce
from torch import Tensor

from reasonrl.errors import ConfigError, ContractError

Reduce = Literal["sum", "mean"]

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def log_density(x: Tensor, mean: Tensor, std: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """Returns (N,) log p(x); the gradient flows through `mean` alone. ContractError for a std of 0."""
    _check_random(std)
    z = (x.detach().to(mean.dtype) - mean) / std
    return _over_dimensions(-0.5 * z.square() - (std.log() + _HALF_LOG_TAU), reduce)


def log_ratio(mean: Tensor, old_mean: Tensor, std: Tensor, x: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """Returns (N,) log p(x) - log p_old(x), the difference of two log-densities, computed without cancellation.

    With z = (x - old_mean) / std and u = (mean - old_mean) / std it is z u - u^2 / 2 a dimension. Its mean over z is
    -u^2 / 2, always below 0, and it grows as 1 / std: small where noise is large and large where it is small.
    """
    z, moved = _standardised(mean, old_mean, std, x)
    return _over_dimensions(moved / std * (z - 0.5 * moved / std), reduce)


def guard_log_ratio(mean: Tensor, old_mean: Tensor, std: Tensor, x: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """Returns (N,) of GRPO-Guard's corrected log-ratio, arXiv 2510.22319: z (mean - old_mean) a dimension.

    The paper's form is std log r + (mean - old_mean)^2 / (2 std), log r the raw one. With x = old_mean + std z and
    m = mean - old_mean, log r = z m / std - m^2 / (2 std^2), and the second term cancels: z m. Its mean over z is 0, so
    ratios lie on both sides of 1, and its spread is |m| without the 1 / std, so one clip range serves all steps. It is
    no likelihood ratio any more: its exponential does not average to 1 under the old policy.
    """
    z, moved = _standardised(mean, old_mean, std, x)
    return _over_dimensions(z * moved, reduce)


def kl_means(
    mean: Tensor, reference: Tensor, std: Tensor, *, step_size: float | Tensor | None = None, reduce: Reduce = "mean"
) -> Tensor:
    """Returns (N,) KL divergences in nats of two Gaussians of one std: (mean - reference)^2 / (2 std^2) a dimension.

    With `step_size` = s - s', one number or (N,), it is multiplied by that. For steps of an SDE, where std^2 =
    g^2 (s - s'), this leaves (mean - reference)^2 / (2 g^2), the penalty of Flow-GRPO's program: no KL, but it does not
    favour the short steps of a schedule.
    """
    _check_random(std)
    divergence = _over_dimensions(0.5 * ((mean - reference) / std).square(), reduce)
    if step_size is None:
        return divergence
    size = torch.as_tensor(step_size).to(divergence)
    if size.shape not in ((), divergence.shape):
        raise ContractError(
            f"step_size is one number or ({len(mean)},), one a row, got {tuple(size.shape)}: give one of the two"
        )
    return divergence * size


def kl_velocities(v: Tensor, reference: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """Returns (N,) squared distances of two velocities: every step counts alike, and deterministic ones too.

    Times b^2 / (2 std^2), b from `Kernel.coefficients` of `renderers.steps`, it is `kl_means`.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    return _over_dimensions((v.to(dtype) - reference.to(dtype)).square(), reduce)


def is_random(std: Tensor) -> bool:
    """Returns whether rows have a density, as no rows do; ContractError where some have and others have none."""
    num_random = int((std > 0).sum())
    if 0 < num_random < std.numel():
        raise ContractError(
            f"{num_random} of {std.numel()} rows have a density and the others have std 0: step them apart"
        )
    return num_random == std.numel()


def _standardised(mean: Tensor, old_mean: Tensor, std: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z and mean - old_mean; the gradient flows through `mean` alone."""
    _check_random(std)
    old = old_mean.detach()
    return (x.detach().to(mean.dtype) - old) / std, mean - old


def _over_dimensions(values: Tensor, reduce: Reduce) -> Tensor:
    if reduce not in ("sum", "mean"):
        raise ConfigError(f'reduce must be "sum" or "mean", got {reduce!r}')
    return einops_reduce(values, "n ... -> n", reduce)


def _check_random(std: Tensor) -> None:
    if not is_random(std):
        raise ContractError(
            "a step of std 0 has no density, so no ratio and no divergence: leave it out of what is trained"
        )
