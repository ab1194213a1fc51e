"""Steps: one denoising step is an action, drawn from a Gaussian, and so it has a density.

Notation. A rectified flow mixes data and noise, `x_s = (1 - s) x0 + s eps`, `s` from 1 (noise) down to 0 (data), and
the model predicts the velocity `v = eps - x0`. A step goes from `s` to `s' < s`, and `d = s' - s < 0`. The model takes
the data to be `x0^ = x - s v` and the noise `eps^ = x + (1 - s) v`. Every kernel here draws `x' = mean + std z`,
`z ~ N(0, I)`, with `mean = a x + b v`: a kernel is three numbers a step (`Kernel.coefficients`).

Latents are (N, ...), D numbers a row. Times are one number for all rows, or (N,); kept on the CPU, no step waits for
the accelerator. Times are computed with in float64, latents in float32 (float64 ones in float64), bfloat16 ones too.
Log-probs are natural logs, float32 likewise, (N,), reduced over a row's D numbers by a stated choice:

- "mean": nats per dimension, as Flow-GRPO, DanceGRPO and DDPO have it. It is the likelihood at a temperature of D:
  ratios sit near 1 whatever the model does, and clip ranges are 1e-4 (Flow-GRPO, DDPO) or 1e-5 (Flow-GRPO-Fast).
- "sum": the likelihood. A clip range then means what it means for tokens; the ones above are D times as wide here (1e-4
  at D = 65,536 is 6.6 nats). Float32 holds such a sum to 1e-2 nats: take its ratios from means
  (`gaussian.log_ratio`), where nothing large cancels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from attrs import field, frozen, validators
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.gaussian import Reduce, is_random, log_density

Time = float | Tensor
"""One number, or (N,): one a row."""
Coefficients = tuple[Tensor, Tensor, Tensor]
"""(a, b, std) of `x' = a x + b v + std z`, float64, shaped as the times."""

_UNIT: Any = validators.and_(validators.ge(0.0), validators.le(1.0))
_ONE = 1 - 1e-6
"""From here on a time is 1: shifted schedules reach 1 only up to rounding."""


# ---- Kernels ---------------------------------------------------------------------------------------


class Kernel(ABC):
    """The distribution of one step, given what the model predicts."""

    @property
    def random(self) -> bool:
        """Whether it adds noise at all: only then its steps have densities."""
        return True

    @abstractmethod
    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (a, b, std) for float64 times of one shape; ContractError where no step leads from s to s_next."""

    @final
    def moments(self, x: Tensor, v: Tensor, s: Time, s_next: Time, /) -> tuple[Tensor, Tensor]:
        """Returns the mean (N, ...), and the std, () or (N, 1, ...); std 0 = deterministic."""
        if x.shape != v.shape:
            raise ContractError(
                f"latents are {tuple(x.shape)} and the prediction is {tuple(v.shape)}: give both one shape"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        times = (_time(s, len(x), dtype), _time(s_next, len(x), dtype))
        on_x, on_v, std = (_beside(each, x, dtype) for each in self.coefficients(*torch.broadcast_tensors(*times)))
        return on_x * x.to(dtype) + on_v * v.to(dtype), std


@final
@frozen
class FlowSDE(Kernel):
    """Flow-GRPO's step, arXiv 2505.05470: `sde_coefficients` with g(s) = eta sqrt(s / (1 - s)).

    That noise is unbounded at s = 1: the error of T steps falls as T^-(eta^2), that of Dance-SDE and the ODE as 1 / T.
    """

    eta: float = field(default=0.7, validator=validators.ge(0.0))
    """Noise level; 0 is the ODE."""
    s_max: float | None = field(
        default=None, validator=validators.optional(validators.and_(validators.gt(0.0), validators.lt(1.0)))
    )
    """Takes the place of s in 1 - s at s = 1. None = where the step ends, which is what the paper's code uses."""

    @property
    def random(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (a, b, std): std = g sqrt(s - s')."""
        last = s_next if self.s_max is None else torch.full_like(s, self.s_max)
        return sde_coefficients(s, s_next, self.eta * (s / (1 - torch.where(s > _ONE, last, s))).sqrt())


@final
@frozen
class DanceSDE(Kernel):
    """DanceGRPO's step, arXiv 2505.07818: `sde_coefficients` with g(s) = eta, whatever s is."""

    eta: float = field(default=0.3, validator=validators.ge(0.0))
    """Noise level; 0 is the ODE."""

    @property
    def random(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (a, b, std): std = eta sqrt(s - s')."""
        return sde_coefficients(s, s_next, torch.full_like(s, self.eta))


@final
@frozen
class CPS(Kernel):
    """Coefficients-preserving sampling, arXiv 2509.05952: part of eps^ is exchanged for fresh noise, and none is added.

    g = s' sin(eta pi / 2), mean = (1 - s') x0^ + sqrt(s'^2 - g^2) eps^, x' = mean + g z. So x0^ has weight 1 - s' and
    all noise together s', as the flow has at s'. The step to s' = 0 is deterministic. The marginals are not the flow's
    for eta > 0, however many steps: x0^ is a mean, so what is drawn is narrower. The paper's code scores
    -mean((x' - mean)^2), without 1 / (2 g^2): that is 2 g^2 times the log-prob here, up to a constant.
    """

    eta: float = field(default=0.8, validator=_UNIT)
    """Share of the noise that is fresh, as an angle over pi / 2; 0 is the ODE."""

    @property
    def random(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (a, b, std): std = g."""
        _check_falls(s, s_next)
        kept = s_next * math.cos(self.eta * math.pi / 2)
        return 1 - s_next + kept, kept * (1 - s) - s * (1 - s_next), s_next * math.sin(self.eta * math.pi / 2)


@final
@frozen
class ODE(Kernel):
    """Euler's step along the velocity, x + d v: no noise, no density."""

    @property
    def random(self) -> bool:
        """False."""
        return False

    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (1, d, 0)."""
        return sde_coefficients(s, s_next, torch.zeros_like(s))


@final
@frozen
class DDIM(Kernel):
    """DDIM's step (arXiv 2010.02502), and DDPO's (arXiv 2305.13301) at eta 1, for variance-preserving models.

    Such a model has `x = sqrt(A) x0 + sqrt(1 - A) eps`, A = alpha_bar, and predicts eps: no straight path, so no s and
    no v. The same arguments therefore mean other things: `v` is the predicted eps, `s` and `s_next` are alpha_bar now
    and after the step, and they rise. std^2 = eta^2 (1 - A') / (1 - A) (1 - A / A'); a step to A' = 1 is deterministic.
    """

    eta: float = field(default=1.0, validator=_UNIT)
    """Share of the posterior's std; 0 is the ODE."""

    @property
    def random(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    def coefficients(self, s: Tensor, s_next: Tensor, /) -> Coefficients:
        """Returns (a, b, std) of `x' = a x + b eps + std z`, for alpha_bar in the place of s."""
        # Equal ones are a step that changes nothing: some schedulers end so.
        _refuse(~((s > 0) & (s <= s_next) & (s_next <= 1)), s, s_next, "alpha_bar must not fall, within (0, 1]")
        variance = self.eta**2 * (1 - s_next) / (1 - s) * (1 - s / s_next)
        on_x = (s_next / s).sqrt()
        return on_x, (1 - s_next - variance).clamp(min=0).sqrt() - on_x * (1 - s).sqrt(), variance.sqrt()


def sde_coefficients(s: Tensor, s_next: Tensor, g: Tensor) -> Coefficients:
    """Returns (a, b, std) of one Euler-Maruyama step of the SDE whose marginals are the flow's, for any g(s) >= 0.

    dx = (v + g^2 / (2 s) eps^) ds + g dw, run from s down: eps^ is -s times the score, so the drift takes back what the
    noise adds. With eps^ = x + (1 - s) v: a = 1 + g^2 d / (2 s), b = d (1 + g^2 (1 - s) / (2 s)), std = g sqrt(-d).
    """
    _check_falls(s, s_next)
    pull = g.square() / (2 * s)
    d = s_next - s
    return 1 + pull * d, d * (1 + pull * (1 - s)), g * (-d).sqrt()


def steps_with_density(kernel: Kernel, times: Sequence[float]) -> tuple[bool, ...]:
    """Returns whether each of the T steps between T + 1 times is random: what can be trained by likelihood."""
    before, after = torch.tensor(times[:-1], dtype=torch.float64), torch.tensor(times[1:], dtype=torch.float64)
    return tuple((kernel.coefficients(before, after)[2] > 0).tolist())


# ---- Sampling and replay ---------------------------------------------------------------------------


@final
@frozen(eq=False)
class Step:
    """One step of N rows."""

    next: Tensor
    """(N, ...) in the dtype it is stored in."""
    mean: Tensor
    """(N, ...); carries the gradient."""
    std: Tensor
    """() or (N, 1, ...)."""
    log_prob: Tensor | None
    """(N,) nats of `next`, reduced as asked; None = deterministic, not a likelihood."""


def step(
    kernel: Kernel,
    x: Tensor,
    v: Tensor,
    s: Time,
    s_next: Time,
    noise: Tensor | None = None,
    *,
    storage_dtype: torch.dtype | None = None,
    reduce: Reduce = "mean",
) -> Step:
    """Draws the next latents, and their density.

    `next` is rounded to `storage_dtype` (None = the dtype of x) before it is scored, so that `replay` of what was
    stored returns the same log-prob. `noise` is (N, ...) standard normals; a deterministic step needs and uses none.
    """
    mean, std = kernel.moments(x, v, s, s_next)
    drawn = mean + std * _noise_like(mean, noise, kernel) if is_random(std) else mean
    return _scored(mean, std, drawn.to(storage_dtype or x.dtype), reduce)


def replay(
    kernel: Kernel, x: Tensor, v: Tensor, s: Time, s_next: Time, x_next: Tensor, *, reduce: Reduce = "mean"
) -> Step:
    """Returns the step as the present prediction sees it, scored at the `x_next` that was stored.

    The gradient flows through `v` (and x). A deterministic step has no density: ContractError.
    """
    mean, std = kernel.moments(x, v, s, s_next)
    if mean.shape != x_next.shape:
        raise ContractError(f"latents are {tuple(mean.shape)} and x_next is {tuple(x_next.shape)}: give both one shape")
    found = _scored(mean, std, x_next, reduce)
    if found.log_prob is None:
        raise ContractError(
            f"{kernel} from {_shown(s)} to {_shown(s_next)} has std 0 and no density: leave that step out of training"
        )
    return found


def _scored(mean: Tensor, std: Tensor, x_next: Tensor, reduce: Reduce) -> Step:
    """What sampling and replay share: the density is that of the stored number."""
    if not is_random(std):
        return Step(x_next, mean, std, None)
    return Step(x_next, mean, std, log_density(x_next, mean, std, reduce=reduce))


# ---- Shapes and checks -----------------------------------------------------------------------------------


def _time(value: Time, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Returns float64 times, () or (N,), as `dtype` has them: a number and a stored float32 of it are one time."""
    time = torch.as_tensor(value, dtype=dtype).double()
    if time.shape not in ((), (num_rows,)):
        raise ContractError(f"a time is one number or ({num_rows},), one a row, got {tuple(time.shape)}")
    return time


def _beside(coefficient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns () where it was, else (N, 1, ...) beside x; a number on the CPU multiplies any device's tensor."""
    if coefficient.ndim == 0:
        return coefficient.to(dtype)
    return coefficient.to(x.device, dtype).reshape(len(x), *[1] * (x.ndim - 1))


def _noise_like(mean: Tensor, noise: Tensor | None, kernel: Kernel) -> Tensor:
    if noise is None or noise.shape != mean.shape:
        found = "none" if noise is None else tuple(noise.shape)
        raise ContractError(f"{kernel} draws with noise of shape {tuple(mean.shape)}, got {found}")
    return noise.to(mean)


def _check_falls(s: Tensor, s_next: Tensor) -> None:
    _refuse(~((s <= 1) & (s_next < s) & (s_next >= 0)), s, s_next, "s must fall, within [0, 1]")


def _refuse(wrong: Tensor, s: Tensor, s_next: Tensor, rule: str) -> None:
    """Raises ContractError that lists every wrong pair of times."""
    if wrong.any():
        pairs = zip(s[wrong].tolist(), s_next[wrong].tolist(), strict=True)
        raise ContractError(f"{rule}, got steps {', '.join(f'{a:g} to {b:g}' for a, b in pairs)}")


def _shown(time: Time) -> str:
    return str(time.tolist()) if isinstance(time, Tensor) else f"{time:g}"
