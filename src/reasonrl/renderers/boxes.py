"""Boxes: how a plan's boxes, and guidance, reach the denoiser.

Guidance is a weighted sum of predictions, v = sum_b w_b v(x, s, conditions_b), sum_b w_b = 1: one branch for each set
of conditions. Classifier-free guidance (arXiv 2207.12598), u + w (c - u), is {"full": w, "blank": 1 - w}.

Two names of conditions mean something to the renderer: "channels" (C', H, W) is concatenated to the latents, and
"attention.NAME" travels to the attention processors as NAME.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, final

from attrs import evolve, frozen

from reasonrl.plan import CANVAS, MIN_SIDE

if TYPE_CHECKING:
    from torch import nn

    from reasonrl.plan import PlannedObject
    from reasonrl.renderers.family import Brief, Conditions, Family, Size


class Boxes(ABC):
    """How a plan's boxes, and guidance, reach the denoiser: named branches of conditions, and their weights."""

    def prepare(self, family: Family) -> None:  # noqa: B027  most boxes leave the denoiser as it is
        """Changes the loaded denoiser once, before adapters are added: wider input, attention processors."""

    def channels(self, family: Family) -> int:
        """Returns how many channels its conditions add to the latents."""
        return 0

    def added(self, denoiser: nn.Module) -> tuple[nn.Module, ...]:
        """Returns the modules that `prepare` gave new weights: they learn even where adapters (LoRA) do."""
        return ()

    @abstractmethod
    def branches(self, guidance: float) -> dict[str, float]:
        """Returns the weight of each branch's prediction; they add to 1; 0 = not computed. The first is the full one.

        A guidance of 1 is none: the full branch alone.
        """

    @abstractmethod
    def conditions(
        self, family: Family, briefs: Sequence[Brief], negative: Brief, size: Size, guidance: float
    ) -> dict[str, list[Conditions]]:
        """Returns for each branch whose weight is not 0 one Conditions a brief.

        A branch that is the same for all briefs holds the same tensor objects.
        """


@final
@frozen
class Native(Boxes):
    """What the pipeline makes of a brief by itself, with classifier-free guidance.

    Families whose pipelines take boxes (GLIGEN) read the brief's objects; the others draw from the text alone.
    """

    def branches(self, guidance: float) -> dict[str, float]:
        """Returns {"full": w, "blank": 1 - w}."""
        return classifier_free(guidance)

    def conditions(
        self, family: Family, briefs: Sequence[Brief], negative: Brief, size: Size, guidance: float
    ) -> dict[str, list[Conditions]]:
        """Returns the family's conditions; "blank" has the negative's, encoded once, or once for each image to edit."""
        weights = self.branches(guidance)
        found: dict[str, list[Conditions]] = {}
        if weights["full"]:
            found["full"] = [{**row} for row in family.encode(briefs, size)]
        if weights.get("blank"):
            images = {id(brief.image): brief.image for brief in briefs}
            without = family.encode([evolve(negative, image=image) for image in images.values()], size)
            by_image = dict(zip(images, without, strict=True))
            found["blank"] = [by_image[id(brief.image)] for brief in briefs]
        return found


def classifier_free(guidance: float) -> dict[str, float]:
    """Returns the weights of w c + (1 - w) u; of c alone at w = 1."""
    return {"full": 1.0} if guidance == 1 else {"full": guidance, "blank": 1 - guidance}


Area = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in fractions of the canvas, within 0..1."""


def areas(objects: Iterable[PlannedObject]) -> list[tuple[int, str, Area]]:
    """Returns place, name and area of each object that has one.

    What lies outside the canvas is cut off, as `Plan.parse` does; a box with a side under 10 left is dropped. Dropped
    objects keep their places.
    """
    found = []
    for place, planned in enumerate(objects):
        if planned.box is None:
            continue
        box = planned.box
        x0, y0, x1, y1 = (min(max(side, 0), CANVAS) for side in (box.x0, box.y0, box.x1, box.y1))
        if min(x1 - x0, y1 - y0) >= MIN_SIDE:
            found.append((place, planned.name, (x0 / CANVAS, y0 / CANVAS, x1 / CANVAS, y1 / CANVAS)))
    return found
