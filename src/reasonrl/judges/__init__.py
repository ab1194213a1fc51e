"""Judges: one file each, and `dual_stage`, which composes four of them."""

from reasonrl.judges.dual_stage import DualStage
from reasonrl.judges.scene import (
    ScenePromptImage,
    SceneReasoningImage,
    SceneSemantic,
    SceneSpatial,
)

__all__ = ["DualStage", "ScenePromptImage", "SceneReasoningImage", "SceneSemantic", "SceneSpatial"]
