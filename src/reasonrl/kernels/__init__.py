"""The only door to the hot path: log-probs, advantages, policy loss. Triton on CUDA, blocks of torch elsewhere.

`reference` is the specification in plain torch; every backend is tested against it in float64.
"""

from reasonrl.kernels.log_probs import ReadyHead, linear_log_prob, linear_logits, selective_log_prob
from reasonrl.kernels.policy import PolicyLoss, group_advantages, masked_aggregate, policy_loss
from reasonrl.kernels.reference import LogProbs, guided_logits, log_softmax

__all__ = [
    "LogProbs",
    "PolicyLoss",
    "ReadyHead",
    "group_advantages",
    "guided_logits",
    "linear_log_prob",
    "linear_logits",
    "log_softmax",
    "masked_aggregate",
    "policy_loss",
    "selective_log_prob",
]
