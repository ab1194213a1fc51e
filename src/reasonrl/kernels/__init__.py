"""The only door to the hot path: log-probs, advantages, policy loss. Plain torch today (`reference`)."""

from reasonrl.kernels.reference import (
    LogProbs,
    clipped_surrogate,
    group_advantages,
    guided_logits,
    k3,
    log_softmax,
    selective_log_prob,
)

__all__ = [
    "LogProbs",
    "clipped_surrogate",
    "group_advantages",
    "guided_logits",
    "k3",
    "log_softmax",
    "selective_log_prob",
]
