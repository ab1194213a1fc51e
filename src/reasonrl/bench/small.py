"""Policy loss and advantages: a launch or two, so microseconds beside the same in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reasonrl.bench.measure import seconds
from reasonrl.kernels import group_advantages, policy_loss
from reasonrl.kernels.backend import Backend

SEQUENCES, ACTIONS = 192, 700
GROUPS, MEMBERS = 64, 16


def small_operators(device: torch.device, *, least_s: float) -> list[dict[str, Any]]:
    """Returns seconds of both backends, and the ratio to ours; the loss forward and backward."""
    noise = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=noise, device=device)

    log_prob, old, anchor = (normal(SEQUENCES, ACTIONS) for _ in range(3))
    advantages, mask = normal(SEQUENCES), torch.ones(SEQUENCES, ACTIONS, dtype=torch.bool, device=device)
    rewards = normal(GROUPS * MEMBERS)
    log_prob.requires_grad_()

    def loss(backend: Backend) -> object:
        found = policy_loss(
            log_prob, old, advantages, mask, reference_log_prob=anchor, kl_coef=0.01, backend=backend
        ).loss
        return torch.autograd.grad(found, log_prob)

    def standings(backend: Backend) -> object:
        return group_advantages(rewards, MEMBERS, backend=backend)

    operators: dict[str, Callable[[Backend], object]] = {
        f"policy_loss {SEQUENCES} x {ACTIONS}, and backward": loss,
        f"group_advantages {GROUPS} x {MEMBERS}": standings,
    }
    backends: tuple[tuple[str, Backend], ...] = (("reasonrl", "auto"), ("torch", "torch"))
    found = []
    for operator, ask in operators.items():
        took = {name: seconds(partial(ask, backend), least_s=least_s) for name, backend in backends}
        for name, value in took.items():
            ratio = value / took["reasonrl"]
            found.append({"operator": operator, "contender": name, "seconds": value, "ratio": ratio})
    return found
