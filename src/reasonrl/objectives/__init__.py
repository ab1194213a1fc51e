"""Objectives: one file each."""

from reasonrl.objectives.grpo import GRPO
from reasonrl.objectives.supervised import Supervised

__all__ = ["GRPO", "Supervised"]
