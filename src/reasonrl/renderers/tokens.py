"""Tokens: image tokens to pixels, by the drawn world's patch codebook or a Janus VQ decoder. Frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, final

import torch
from attrs import define, evolve, field, frozen, validators
from PIL import Image
from torch import Tensor

from reasonrl.errors import ContractError
from reasonrl.formats.files import checkpoint_folder
from reasonrl.formats.janus import load_decoder
from reasonrl.interfaces import Renderer
from reasonrl.noise import Draw
from reasonrl.scenes import codec
from reasonrl.types import Trajectory

if TYPE_CHECKING:
    from transformers import JanusVQVAE

PATCHES = "patches"


@define(eq=False)
class _Decoder:
    path: str | None = None
    model: JanusVQVAE | None = None

    def load(self, path: str) -> JanusVQVAE:
        if self.model is None or self.path != path:
            self.model, self.path = load_decoder(checkpoint_folder(path)), path
            if torch.cuda.is_available():  # the process's own GPU, as for what is trained
                self.model.to("cuda")
        return self.model


@final
@frozen
class Tokens(Renderer):
    """Adds images["image"] from a segment of token ids; a trajectory without that segment stays as it is."""

    source: str = PATCHES
    """"patches" = the drawn world's codebook; otherwise a Janus checkpoint's folder or Hub name, whose VQ decodes."""
    stage: str = "image"
    num_rows: int = field(default=64, validator=validators.ge(1))
    """Images decoded at once."""
    _decoder: _Decoder = field(factory=_Decoder, eq=False, repr=False)

    def render(self, trajectories: Sequence[Trajectory], *, draw: Draw) -> list[Trajectory]:
        """Adds one image to each trajectory that has the tokens; draws no noise."""
        with_tokens = [t for t in trajectories if self.stage in t.segments]
        images = iter(self._decode([t.segments[self.stage].actions for t in with_tokens]))
        return [
            evolve(t, images={**t.images, self.stage: next(images)}) if self.stage in t.segments else t
            for t in trajectories
        ]

    def _decode(self, tokens: Sequence[Tensor]) -> Iterator[Image.Image]:
        if self.source == PATCHES:
            yield from (codec.decode(row.cpu().numpy()) for row in tokens)
            return
        model = self._decoder.load(self.source)
        for start in range(0, len(tokens), self.num_rows):
            yield from _vq_images(model, torch.stack(list(tokens[start : start + self.num_rows])))


def _vq_images(model: JanusVQVAE, tokens: Tensor) -> Iterator[Image.Image]:
    side = model.config.num_patches
    if tokens.shape[1] != side * side:
        raise ContractError(f"the VQ decoder draws {side}x{side} tokens an image, got {tokens.shape[1]}")
    with torch.no_grad():
        pixels = model.decode(tokens.to(model.device)).float().cpu()
    # The decoder's range is [-1, 1] (Janus' image processor uses mean and std 0.5).
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for image in scaled.permute(0, 2, 3, 1).numpy():
        yield Image.fromarray(image)
