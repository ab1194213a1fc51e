"""Policies: one file each."""

from reasonrl.policies.got_r1 import GoTR1
from reasonrl.policies.planner import Planner

__all__ = ["GoTR1", "Planner"]
