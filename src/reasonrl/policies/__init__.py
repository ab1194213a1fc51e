"""Policies: one file each."""

from reasonrl.policies.got_r1 import GoTR1

__all__ = ["GoTR1"]
