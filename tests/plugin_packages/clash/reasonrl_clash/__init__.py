"""Offers names that reasonrl-good offers too."""

from reasonrl.interfaces.judge import Sum as Sharpness

__all__ = ["Sharpness"]
