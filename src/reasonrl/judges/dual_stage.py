"""DualStage: GoT-R1's reward, in both published forms, from any four judges with its ranges.

DualStage()                                               # exact, of drawn scenes
DualStage("iclr-2026", vlm=Cached(Server("judge"), "judge-cache"))    # asks a model
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, final

from attrs import field, frozen, validators

from reasonrl.errors import ConfigError
from reasonrl.interfaces import Judge
from reasonrl.interfaces.judge import checked
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
from reasonrl.judges.together import together
from reasonrl.judges.vlm import VLM
from reasonrl.types import Trajectory, Verdict

Preset = Literal["arxiv-v1", "iclr-2026"]


_JUDGE = validators.optional(validators.instance_of(Judge))  # type: ignore[type-abstract]


@final
@frozen
class DualStage(Judge):
    """The dual-stage multi-dimensional reward (arXiv 2505.17022 section 3.3), a product of parts in [0, 1].

    "arxiv-v1":  R_PI · (R_sem + R_spa) · R_RI, in [0, 2]
    "iclr-2026": R_PI · (R_sem + R_spa) / 2 · R_RI · R_HPS, in [0, 1]; without `preference` it lacks R_HPS

    With `vlm` the four parts ask it, all at once; without, they judge drawn scenes exactly. Each part can be another
    judge: `DualStage(vlm=vlm, spatial=PlanGeometry())`; None = the usual one, whoever the `vlm` is.
    """

    preset: Preset = field(default="arxiv-v1", validator=validators.in_(("arxiv-v1", "iclr-2026")))
    vlm: VLM | None = field(default=None, kw_only=True)
    """Whom the parts ask; None = nobody."""
    prompt_image: Judge | None = field(default=None, validator=_JUDGE, kw_only=True)
    semantic: Judge | None = field(default=None, validator=_JUDGE, kw_only=True)
    spatial: Judge | None = field(default=None, validator=_JUDGE, kw_only=True)
    reasoning_image: Judge | None = field(default=None, validator=_JUDGE, kw_only=True)
    preference: Judge | None = field(default=None, validator=_JUDGE, kw_only=True)
    """R_HPS, a human-preference score in [0, 1]; only in the iclr-2026 form."""

    def __attrs_post_init__(self) -> None:
        self.parts  # noqa: B018 - refuses whom nobody can ask
        if self.preference is not None and self.preset == "arxiv-v1":
            raise ConfigError("preset arxiv-v1 has no preference factor: use preset='iclr-2026' or leave it out")

    @property
    def parts(self) -> tuple[Judge, ...]:
        """R_PI, R_sem, R_spa, R_RI, and R_HPS where there is one."""
        usual: tuple[Judge, ...] = (ScenePromptImage(), SceneSemantic(), SceneSpatial(), SceneReasoningImage())
        if self.vlm is not None:
            usual = PromptImage(self.vlm), Semantic(self.vlm), Spatial(self.vlm), ReasoningImage(self.vlm)
        given = (self.prompt_image, self.semantic, self.spatial, self.reasoning_image)
        four = tuple(default if mine is None else mine for mine, default in zip(given, usual, strict=True))
        return four if self.preference is None else (*four, self.preference)

    @property
    def expression(self) -> Judge:
        """The reward, written out."""
        return self._written(self.parts)

    def _written(self, parts: Sequence[Judge]) -> Judge:
        prompt_image, semantic, spatial, reasoning_image, *preference = parts
        if self.preset == "arxiv-v1":
            return prompt_image * (semantic + spatial) * reasoning_image
        halved = prompt_image * (0.5 * semantic + 0.5 * spatial) * reasoning_image
        return halved * preference[0] if preference else halved

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
        if self.vlm is None:
            return self.expression.judge(trajectories)
        said = together([partial(checked, part, trajectories) for part in self.parts])
        return self._written([_Said(part, verdicts) for part, verdicts in zip(self.parts, said, strict=True)]).judge(
            trajectories
        )


@frozen
class _Said(Judge):
    """A part whose verdicts are in."""

    part: Judge
    verdicts: Sequence[Verdict]

    @property
    def needs(self) -> frozenset[str]:
        return self.part.needs

    @property
    def stages(self) -> frozenset[str]:
        return self.part.stages

    def judge(self, trajectories: Sequence[Trajectory]) -> Sequence[Verdict]:
        return self.verdicts
