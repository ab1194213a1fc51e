"""reasonrl: reinforcement learning for models that think before they draw.

Importing it loads neither torch nor transformers; `train` and `run` arrive on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "reasonrl.errors": (
        "CheckpointError",
        "ConfigError",
        "ContractError",
        "DataError",
        "JudgeError",
        "PluginError",
        "RankError",
        "ReasonRLError",
    ),
    "reasonrl.hooks": ("hookimpl",),
    "reasonrl.interfaces": (
        "Judge",
        "Objective",
        "PointwiseJudge",
        "Policy",
        "Renderer",
        "Teachable",
        "Trainable",
    ),
    "reasonrl.loop": ("train",),
    "reasonrl.noise": ("Draw",),
    "reasonrl.plan": ("Box", "Plan", "PlannedObject"),
    "reasonrl.recipe": ("Recipe",),
    "reasonrl.session": ("run",),
    "reasonrl.types": (
        "EVERY",
        "Batch",
        "Loss",
        "Prompt",
        "Replay",
        "Rewards",
        "Score",
        "Segment",
        "Stage",
        "Term",
        "Trajectory",
        "Verdict",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'reasonrl' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from reasonrl.errors import (
        CheckpointError,
        ConfigError,
        ContractError,
        DataError,
        JudgeError,
        PluginError,
        RankError,
        ReasonRLError,
    )
    from reasonrl.hooks import hookimpl
    from reasonrl.interfaces import (
        Judge,
        Objective,
        PointwiseJudge,
        Policy,
        Renderer,
        Teachable,
        Trainable,
    )
    from reasonrl.loop import train
    from reasonrl.noise import Draw
    from reasonrl.plan import Box, Plan, PlannedObject
    from reasonrl.recipe import Recipe
    from reasonrl.session import run
    from reasonrl.types import (
        EVERY,
        Batch,
        Loss,
        Prompt,
        Replay,
        Rewards,
        Score,
        Segment,
        Stage,
        Term,
        Trajectory,
        Verdict,
    )
