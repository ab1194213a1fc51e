"""Supervised: the negative log-likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from attrs import frozen
from torch import Tensor

from reasonrl.interfaces import Objective
from reasonrl.types import Loss, Replay, Rewards, Stage


@final
@frozen
class Supervised(Objective):
    """Fine-tuning on demonstrations; the loss of a stage is a mean over its own actions, in nats."""

    def advantages(self, rewards: Rewards) -> tuple[Tensor, Tensor]:
        """Returns ones: every demonstration takes part, whatever a judge says."""
        num_draws = len(rewards.groups)
        return torch.ones(num_draws), torch.ones(num_draws, dtype=torch.bool)

    def loss(self, stage: Stage, replay: Replay, frozen: Mapping[str, Replay]) -> Loss:
        """Returns −Σ log p over trained actions."""
        assert replay.log_probs is not None
        total = -replay.log_probs[stage.mask].sum()
        return Loss(total, {"nats": total.detach()})
