"""Denoising: a chunk of pictures drawn step by step, and trained steps seen again. One function predicts for both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, final

import torch
from attrs import evolve, frozen
from torch import Tensor

from reasonrl.renderers.family import ATTENTION, CHANNELS, Conditions, Family, Schedule
from reasonrl.renderers.steps import DDIM, ODE, Kernel, Reduce, Step, step

Guided = Mapping[str, Conditions]
"""The conditions of each branch, K rows each."""


@final
@frozen
class Guidance:
    """The weights of the branches' predictions; they add to 1, and the first is the full one."""

    weights: Mapping[str, float]
    detached: bool = False
    """No gradient through any branch but the first."""

    @property
    def branches(self) -> dict[str, float]:
        """The branches that are computed."""
        return {name: weight for name, weight in self.weights.items() if weight}


def predict(family: Family, guidance: Guidance, x: Tensor, inputs: Tensor, conditions: Guided) -> Tensor:
    """Returns (K, C, H, W) float32 velocities (or ε) of K latents: the weighted sum of the branches' predictions."""
    first = next(iter(guidance.weights))
    total = torch.zeros((), device=x.device)
    for name, weight in guidance.branches.items():
        with torch.no_grad() if guidance.detached and name != first else nullcontext():
            found = _branch(family, x, inputs, conditions[name])
        total = total + weight * found  # with gradient, whatever this branch had
    return total


def _branch(family: Family, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
    denoiser: Any = family.denoiser
    dtype = denoiser.dtype
    seen = {
        name: value.to(dtype) if value.is_floating_point() and not name.startswith(ATTENTION) else value
        for name, value in conditions.items()
    }
    extra = seen.pop(CHANNELS, None)
    kept = x.to(dtype) if family.flow else x.float()  # ε from a predicted v is computed in float32
    latents = kept if extra is None else torch.cat([kept, extra.to(kept)], 1)
    return family.predict(latents, inputs, seen).to(torch.promote_types(dtype, torch.float32))


def velocity(family: Family, guidance: Guidance, x: Tensor, t: Tensor, conditions: Guided) -> Tensor:
    """Returns (K, C, H, W) velocities ε − x0 at points x = (1 − t) x0 + t ε of a flow, whatever the model's own path.

    A variance-preserving model sees x / √((1 − t)² + t²), whose alpha_bar is (1 − t)² / ((1 − t)² + t²), at the
    timestep nearest to it; its ε gives v = (ε − x) / (1 − t). From the last timestep on, t is held where that is.
    """
    if family.flow:
        return predict(family, guidance, x, t.float(), conditions)
    alphas = family.pipe.scheduler.alphas_cumprod.to(x.device, torch.float64)
    alpha = ((1 - t.double()).square() / ((1 - t.double()).square() + t.double().square())).clamp(min=alphas.min())
    timestep = (alphas[None] - alpha[:, None]).abs().argmin(1)
    beside = [len(x), *[1] * (x.ndim - 1)]
    data, noise = alpha.sqrt().to(x).reshape(beside), (1 - alpha).sqrt().to(x).reshape(beside)
    eps = predict(family, guidance, x * (data + noise), timestep.float(), conditions)
    # 1 − t = √A / (√A + √(1 − A)), and so x times the sum of the two has unit variance.
    return (eps - x) * (data + noise) / data


@final
@frozen(eq=False)
class Path:
    """How a chunk is drawn: when the steps are, which are random and recorded, and by which kernel."""

    family: Family
    guidance: Guidance
    schedule: Schedule
    kernel: Kernel
    """Of the recorded steps; the others follow the ODE."""
    recorded: tuple[bool, ...]
    """(T,): one run of True, or none."""
    storage: torch.dtype = torch.float32
    reduce: Reduce = "mean"

    def before(self, x: Tensor, conditions: Guided) -> Tensor:
        """Returns latents at the first recorded step, or at the end where there is none; as they are stored."""
        first = self.recorded.index(True) if any(self.recorded) else len(self.recorded)
        x = self._deterministic(x, conditions, range(first))
        return x.to(self.storage) if any(self.recorded) else x

    def random(self, x: Tensor, conditions: Guided, noise: Iterable[Tensor], *, keep_means: bool = True) -> list[Step]:
        """Returns the recorded steps from the stored latents x, one (N, C, H, W) of `noise` each, drawn when needed."""
        steps: list[Step] = []
        for i, fresh in zip((i for i, taken in enumerate(self.recorded) if taken), noise, strict=True):
            found = step(
                self.kernel,
                x,
                self._predict(x.float(), i, conditions),
                *self._times(i),
                fresh,
                storage_dtype=self.storage,
                reduce=self.reduce,
            )
            steps.append(found if keep_means else evolve(found, mean=found.mean[:0]))
            x = found.next
        return steps

    def after(self, x: Tensor, conditions: Guided) -> Tensor:
        """Returns the clean latents from those after the last recorded step."""
        last = max((i for i, is_recorded in enumerate(self.recorded) if is_recorded), default=len(self.recorded) - 1)
        return self._deterministic(x, conditions, range(last + 1, len(self.recorded)))

    def _deterministic(self, x: Tensor, conditions: Guided, places: range) -> Tensor:
        kernel: Kernel = ODE() if self.family.flow else DDIM(eta=0.0)
        x = x.float()
        for i in places:
            x = step(kernel, x, self._predict(x, i, conditions), *self._times(i)).next
        return x

    def _predict(self, x: Tensor, i: int, conditions: Guided) -> Tensor:
        inputs = self.schedule.inputs[i].to(x.device).expand(len(x))
        return predict(self.family, self.guidance, x, inputs, conditions)

    def _times(self, i: int) -> tuple[float, float]:
        return float(self.schedule.times[i]), float(self.schedule.times[i + 1])
