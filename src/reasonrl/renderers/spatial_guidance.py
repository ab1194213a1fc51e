"""SpatialGuidance: GoT's semantic-spatial guidance, arXiv 2503.10639.

Three conditions: G_t the text, G_s the boxes, G_r the picture to edit. G_s and G_r are latents of the VAE, beside the
noisy latents as further input channels. The guided velocity (or noise) is

    v = v(0, 0, 0) + a_t [v(G_t, 0, G_r) - v(0, 0, G_r)] + a_s [v(G_t, G_s, G_r) - v(G_t, 0, G_r)]
        + a_r [v(0, 0, G_r) - v(0, 0, 0)]

G_s: each object's box in its colour on black, encoded by the VAE; the mean over objects. G_r: the picture, or a black
one where there is none. The paper's a_t, a_s are 7.5, 4.0 for text to image, and a_t, a_s, a_r are 4.0, 3.0, 1.5 for
editing. What its description leaves open is decided here: the absent G_s and G_r are latents of zeros, as
InstructPix2Pix has them (so an absent G_r is not the black picture); the absent G_t is the renderer's negative text;
a plan without boxes has the absent G_s; colours go round the hues by the golden ratio.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from attrs import field, frozen
from torch import Tensor, nn

from reasonrl.errors import ConfigError
from reasonrl.renderers.boxes import Boxes, areas
from reasonrl.renderers.family import CHANNELS

if TYPE_CHECKING:
    from PIL.Image import Image

    from reasonrl.plan import PlannedObject
    from reasonrl.renderers.family import Brief, Conditions, Family, Size

_GOLDEN = (math.sqrt(5) - 1) / 2


def _finite(_: object, attribute: Any, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"SpatialGuidance: {attribute.name} must be a finite number, got {value}")


@final
@frozen
class SpatialGuidance(Boxes):
    """GoT's guidance by text, colour masks and reference picture, for Stable Diffusion 1.x, 2.x, XL and 3.x.

    `prepare` widens the denoiser's first layer, with weights of 0: until they are trained, boxes and pictures change
    nothing, the guided prediction is classifier-free guidance at a_t, and each prediction is the narrow denoiser's
    (exactly, but where a library sums a wider convolution in another order). The widened denoiser is saved and loaded
    by diffusers; a pipeline of its own accord does not feed it the further channels.
    """

    text: float = field(default=7.5, validator=_finite)
    """a_t."""
    spatial: float = field(default=4.0, validator=_finite)
    """a_s."""
    reference: float = field(default=1.5, validator=_finite)
    """a_r; 1 saves the fourth prediction, which has weight 1 - a_r."""

    def prepare(self, family: Family) -> None:
        """Widens the first layer to three times the latents' channels, with zeros; if it is as wide, does nothing."""
        name, layer = _first_layer(family.denoiser)
        old, latent = layer.in_channels, int(family.pipe.vae.config.latent_channels)
        if old not in (latent, 3 * latent):
            raise ConfigError(
                f"the denoiser's {name} takes {old} channels, and SpatialGuidance widens {latent} to {3 * latent}: use"
                " a denoiser of latents alone, or one that was widened"
            )
        if old == latent:
            _widen(family.denoiser, layer, 3 * latent)

    def channels(self, family: Family) -> int:
        """Returns those of the boxes and of the reference."""
        return 2 * int(family.pipe.vae.config.latent_channels)

    def added(self, denoiser: nn.Module) -> tuple[nn.Module, ...]:
        """Returns the first layer: its new weights are 0 and have everything to learn."""
        return (_first_layer(denoiser)[1],)

    def branches(self, guidance: float) -> dict[str, float]:
        """Returns the sum above, collected by prediction; at guidance 1 the full one alone.

        Any other guidance leaves all to `text`, `spatial` and `reference`.
        """
        if guidance == 1:
            return {"full": 1.0}
        return {
            "full": self.spatial,  # G_t, G_s, G_r
            "text": self.text - self.spatial,  # G_t, 0, G_r
            "reference": self.reference - self.text,  # 0, 0, G_r
            "blank": 1 - self.reference,  # 0, 0, 0
        }

    @torch.no_grad()
    def conditions(
        self, family: Family, briefs: Sequence[Brief], negative: Brief, size: Size, guidance: float
    ) -> dict[str, list[Conditions]]:
        """Returns each branch's conditions, with "channels" (2 C, H, W): G_s, then G_r."""
        latents = _Latents(family, size)
        written = family.encode(briefs, size)
        (nothing,) = family.encode([negative], size)
        drawn = [latents.of_boxes(brief.objects) for brief in briefs]
        shown = [latents.of_picture(brief.image) for brief in briefs]
        zero = torch.zeros_like(shown[0]) if shown else torch.zeros(family.latent_shape(size))
        blank = {**nothing, CHANNELS: torch.cat([zero, zero])}
        unwritten = {id(r): {**nothing, CHANNELS: torch.cat([zero, r])} for r in shown}
        found: dict[str, list[Conditions]] = {
            "full": [
                {**w, CHANNELS: torch.cat([zero if s is None else s, r])}
                for w, s, r in zip(written, drawn, shown, strict=True)
            ],
            "text": [{**w, CHANNELS: torch.cat([zero, r])} for w, r in zip(written, shown, strict=True)],
            "reference": [unwritten[id(r)] for r in shown],
            "blank": [blank for _ in briefs],
        }
        return {name: found[name] for name, weight in self.branches(guidance).items() if weight}


def colour(place: int) -> tuple[int, int, int]:
    """Returns the RGB of the object at a place of the plan: bright, and the same in every process."""
    red, green, blue = colorsys.hsv_to_rgb(place * _GOLDEN % 1, 1.0, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def colour_masks(objects: Sequence[PlannedObject], size: Size) -> list[Image]:
    """Returns one picture an object with a box, in the plan's order: its box in its colour, on black."""
    from PIL import Image, ImageDraw

    height, width = size
    found = []
    for place, _, (x0, y0, x1, y1) in areas(objects):
        mask = Image.new("RGB", (width, height))
        left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
        right, bottom = max(round(x1 * width) - 1, left), max(round(y1 * height) - 1, top)  # the last pixels, included
        ImageDraw.Draw(mask).rectangle((left, top, right, bottom), fill=colour(place))
        found.append(mask)
    return found


@final
class _Latents:
    """Encodes pictures one at a time, so that none depends on the others, and the same one once a call."""

    def __init__(self, family: Family, size: Size) -> None:
        self.family, self.size = family, size
        self.seen: dict[object, Tensor] = {}

    def of_boxes(self, objects: tuple[PlannedObject, ...]) -> Tensor | None:
        """Returns (C, H, W), the mean over the masks; None without a box."""
        masks = [self._encoded(mask.tobytes(), mask) for mask in colour_masks(objects, self.size)]
        return torch.stack(masks).mean(0) if masks else None

    def of_picture(self, picture: Image | None) -> Tensor:
        """Returns (C, H, W) of the picture at this size, or of a black one: the same object for the same picture."""
        from PIL import Image

        height, width = self.size
        return self._encoded(id(picture), picture or Image.new("RGB", (width, height)))

    def _encoded(self, key: object, picture: Image) -> Tensor:
        if key not in self.seen:
            self.seen[key] = _encode(self.family.pipe, picture.convert("RGB"), self.size)
        return self.seen[key]


def _encode(pipe: Any, picture: Image, size: Size) -> Tensor:
    """Returns (C, H, W) float32: the mode of the VAE's posterior, scaled as the image-to-image pipelines scale it."""
    vae, config = pipe.vae, pipe.vae.config
    pixels = pipe.image_processor.preprocess(picture, height=size[0], width=size[1])
    upcast = vae.dtype == torch.float16 and config.get("force_upcast", False)  # SDXL's VAE overflows in float16
    if upcast:
        vae.to(dtype=torch.float32)
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
    if upcast:
        vae.to(dtype=torch.float16)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (mode.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return (mode - mean) / std * config.scaling_factor
    return (mode - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _first_layer(denoiser: nn.Module) -> tuple[str, nn.Conv2d]:
    """Returns the name and the convolution that the latents enter by."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    names = {UNet2DConditionModel: "conv_in", SD3Transformer2DModel: "pos_embed.proj"}
    name = next((name for kind, name in names.items() if isinstance(denoiser, kind)), None)
    if name is None:
        raise ConfigError(
            f"SpatialGuidance widens UNet2DConditionModel and SD3Transformer2DModel, got {type(denoiser).__name__}:"
            " leave its boxes Native()"
        )
    layer = denoiser.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return name, layer


def _widen(denoiser: Any, layer: nn.Conv2d, num_channels: int) -> None:
    """Adds input channels of weight 0 in place, and tells the configuration; output channels stay as they are."""
    old = layer.weight
    new = old.new_zeros(len(old), num_channels - layer.in_channels, *old.shape[2:])
    layer.weight = nn.Parameter(torch.cat([old.detach(), new], dim=1), requires_grad=old.requires_grad)
    layer.in_channels = num_channels
    out = denoiser.config.out_channels
    denoiser.register_to_config(in_channels=num_channels, out_channels=denoiser.out_channels if out is None else out)
