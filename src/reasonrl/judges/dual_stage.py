"""DualStage: GoT-R1's reward, in both published forms, from any four judges with its ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from attrs import field, frozen, validators

from reasonrl.errors import ConfigError
from reasonrl.interfaces import Judge
from reasonrl.judges.scene import (
    ScenePromptImage,
    SceneReasoningImage,
    SceneSemantic,
    SceneSpatial,
)
from reasonrl.types import Trajectory, Verdict

Preset = Literal["arxiv-v1", "iclr-2026"]


@final
@frozen
class DualStage(Judge):
    """The dual-stage multi-dimensional reward (arXiv 2505.17022 section 3.3), a product of parts in [0, 1].

    "arxiv-v1":  R_PI · (R_sem + R_spa) · R_RI, in [0, 2]
    "iclr-2026": R_PI · (R_sem + R_spa) / 2 · R_RI · R_HPS, in [0, 1]; without `preference` it lacks R_HPS

    The defaults judge drawn scenes exactly; the parts are judges like any other.
    """

    preset: Preset = field(default="arxiv-v1", validator=validators.in_(("arxiv-v1", "iclr-2026")))
    prompt_image: Judge = field(factory=ScenePromptImage)
    semantic: Judge = field(factory=SceneSemantic)
    spatial: Judge = field(factory=SceneSpatial)
    reasoning_image: Judge = field(factory=SceneReasoningImage)
    preference: Judge | None = None
    """R_HPS, a human-preference score in [0, 1]; only in the iclr-2026 form."""

    def __attrs_post_init__(self) -> None:
        if self.preference is not None and self.preset == "arxiv-v1":
            raise ConfigError("preset arxiv-v1 has no preference factor: use preset='iclr-2026' or leave it out")

    @property
    def expression(self) -> Judge:
        """The reward, written out."""
        if self.preset == "arxiv-v1":
            return self.prompt_image * (self.semantic + self.spatial) * self.reasoning_image
        halved = self.prompt_image * (0.5 * self.semantic + 0.5 * self.spatial) * self.reasoning_image
        return halved if self.preference is None else halved * self.preference

    @property
    def needs(self) -> frozenset[str]:
        """What its parts need."""
        return self.expression.needs

    @property
    def stages(self) -> frozenset[str]:
        """What its parts speak of."""
        return self.expression.stages

    def judge(self, trajectories: Sequence[Trajectory]) -> Sequence[Verdict]:
        """Returns the product, with the raw score of every part beside it."""
        return self.expression.judge(trajectories)
