"""A package as users write them: a judge, a recipe, an observer."""

from reasonrl_good.judge import Sharpness

__all__ = ["Sharpness"]


def recipe() -> str:
    return "a recipe"
