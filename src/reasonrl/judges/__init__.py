"""Judges: one file each, `dual_stage`, which composes four of them, and the tools they ask."""

from reasonrl.judges.dual_stage import DualStage
from reasonrl.judges.prompt_image import PromptImage
from reasonrl.judges.reasoning_image import ReasoningImage
from reasonrl.judges.scene import (
    ScenePromptImage,
    SceneReasoningImage,
    SceneSemantic,
    SceneSpatial,
)
from reasonrl.judges.semantic import Semantic
from reasonrl.judges.spatial import Spatial

__all__ = [
    "DualStage",
    "PromptImage",
    "ReasoningImage",
    "ScenePromptImage",
    "SceneReasoningImage",
    "SceneSemantic",
    "SceneSpatial",
    "Semantic",
    "Spatial",
]
