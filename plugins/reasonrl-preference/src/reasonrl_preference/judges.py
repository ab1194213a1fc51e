"""The four judges. Each has a raw range, and the linear map of it to [0, 1] that its fields state.

low=0, high=1 gives a cosine as it is. What lies outside low..high is clamped, so a policy that reaches `high` learns
nothing more from the judge: leave room above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import field, frozen, validators

from reasonrl import Judge, Trajectory, Verdict
from reasonrl_preference.scoring import scored, span
from reasonrl_preference.settings import DTYPES, Precision

_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_VIT_L = "openai/clip-vit-large-patch14"


@final
@frozen
class HPS(Judge):
    """HPSv2.1 (arXiv 2306.09341): the cosine of a ViT-H/14 trained on people's choices; raw about 0.15 to 0.40.

    Pictures are scaled to fit the square and padded with black, as its authors do, where CLIP crops. The text is cut
    at 77 tokens. GoT-R1's R_HPS is in [0, 1] (ICLR 2026), but how the paper maps it there is not published: here 0.15
    is 0 and 0.40 is 1, since published generators score about 0.20 to 0.35 and policies trained on it go beyond.
    """

    weights: str = "xswu/HPSv2:HPS_v2.1_compressed.pt"
    """An open_clip checkpoint (.pt, .safetensors), or "owner/name:file" on the hub; or a folder of a CLIPModel."""
    model: str = _VIT_H
    """Folder or hub name with the architecture, the tokenizer and the pictures' mean and deviation; not its weights."""
    low: float = 0.15
    high: float = span(0.40)
    batch_size: int = field(default=32, validator=validators.gt(0))
    device: str | None = None
    """None = the GPU where there is one."""
    dtype: Precision = field(default="float32", validator=validators.in_(DTYPES))
    needs = frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one score each; no image is a 0, and what cannot be judged is None with the reason."""

        def measure(batch: Sequence[Trajectory]) -> list[float]:
            from reasonrl_preference.clip import encoder

            clip = encoder(self.model, device=self.device, dtype=self.dtype, weights=self.weights, pad=True)
            return clip.cosines(batch).tolist()

        return scored("HPS", trajectories, measure, low=self.low, high=self.high, batch_size=self.batch_size)


@final
@frozen
class PickScore(Judge):
    """PickScore v1 (arXiv 2305.01569): logit scale · cosine of a ViT-H/14; raw about 18 to 24, here divided by 26."""

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = _VIT_H
    """Where its tokenizer and picture settings are; None = with the model."""
    low: float = 0.0
    high: float = span(26.0)
    batch_size: int = field(default=32, validator=validators.gt(0))
    device: str | None = None
    """None = the GPU where there is one."""
    dtype: Precision = field(default="float32", validator=validators.in_(DTYPES))
    needs = frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one score each; no image is a 0, and what cannot be judged is None with the reason."""

        def measure(batch: Sequence[Trajectory]) -> list[float]:
            from reasonrl_preference.clip import encoder

            clip = encoder(self.model, device=self.device, dtype=self.dtype, processor=self.processor)
            return (clip.scale * clip.cosines(batch)).tolist()

        return scored("PickScore", trajectories, measure, low=self.low, high=self.high, batch_size=self.batch_size)


@final
@frozen
class ClipScore(Judge):
    """CLIPScore (arXiv 2104.08718): 2.5 · the cosine of prompt and image, within [0, 1]; raw cosines are 0.15 to 0.40.

    Weak on composition, and prompts beyond 77 tokens are cut: a companion of other judges, not the only one.
    """

    model: str = _VIT_L
    low: float = 0.0
    high: float = span(0.4)
    batch_size: int = field(default=32, validator=validators.gt(0))
    device: str | None = None
    """None = the GPU where there is one."""
    dtype: Precision = field(default="float32", validator=validators.in_(DTYPES))
    needs = frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one score each; no image is a 0, and what cannot be judged is None with the reason."""

        def measure(batch: Sequence[Trajectory]) -> list[float]:
            from reasonrl_preference.clip import encoder

            return encoder(self.model, device=self.device, dtype=self.dtype).cosines(batch).tolist()

        return scored("ClipScore", trajectories, measure, low=self.low, high=self.high, batch_size=self.batch_size)


@final
@frozen
class Aesthetic(Judge):
    """LAION's aesthetic predictor: an affine map of the unit CLIP ViT-L/14 image embedding; raw 1 to 10, divided by 10.

    It does not see the prompt: alone it teaches one pretty picture for all of them.
    """

    head: str
    """The predictor's weights (.pth, .pt or .safetensors), or "owner/name:file" on the hub."""
    model: str = _VIT_L
    low: float = 0.0
    high: float = span(10.0)
    batch_size: int = field(default=32, validator=validators.gt(0))
    device: str | None = None
    """None = the GPU where there is one."""
    dtype: Precision = field(default="float32", validator=validators.in_(DTYPES))
    needs = frozenset({"image"})

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """Returns one score each; no image is a 0, and what cannot be judged is None with the reason."""

        def measure(batch: Sequence[Trajectory]) -> list[float]:
            from reasonrl_preference.aesthetic import predicted
            from reasonrl_preference.clip import encoder

            clip = encoder(self.model, device=self.device, dtype=self.dtype)
            return predicted(self.head, clip.image_embeddings([t.image for t in batch])).tolist()

        return scored("Aesthetic", trajectories, measure, low=self.low, high=self.high, batch_size=self.batch_size)
