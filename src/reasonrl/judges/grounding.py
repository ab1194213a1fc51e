"""Where things are in a picture: one interface, and behind it a vision-language model's own boxes, or `detectors`.

found = VLMBoxes(vlm).locate([Sight(image, "red cup")])
found[0].boxes        # in a plan's units; () = looked and found none, None = could not look, and `note` says why
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from attrs import field, frozen

from reasonrl.errors import ConfigError, ContractError
from reasonrl.judges.vlm import (
    GUARD,
    OUT_OF_RANGE,
    REFUSED,
    UNPARSEABLE,
    VLM,
    Boxes,
    Coordinates,
    Question,
    Reply,
    Text,
    quoted,
    shown,
    strict_json,
)
from reasonrl.plan import CANVAS, Box

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BOXES = 16
"""Boxes of one name in one picture; further ones are left out."""
TILE = 224
"""Sides of a picture sent to a model are multiples of it, so of 28 and 32: then neither Qwen2.5-VL nor Qwen3-VL
resizes it, and pixels that a model reports are pixels of what was sent."""
SMALLEST_SIDE = 2 * TILE
"""Above every family's least number of pixels: below it a server enlarges pictures, and does not say so."""
SLACK = 0.02
"""Fraction of the picture that a coordinate may lie beyond its edge; it is then clamped."""
BOX_KEYS = ("bbox_2d", "bbox", "box")
VERSION = "1"
"""Of the wording below."""


@frozen(eq=False)
class Sight:
    """What to look for, and where."""

    image: Image
    name: str


@frozen
class Found:
    """The boxes of a name in a picture, in a plan's units."""

    boxes: tuple[Box, ...] | None
    """() = looked and found none; None = could not look."""
    note: str = ""
    """Why there are none, or what is special about them; of None it begins with one of the reasons in `vlm`."""
    cost: Mapping[str, float] = field(factory=dict, eq=False)
    """As of `Score`."""


class Locator(ABC):
    """Whoever finds things in pictures: a VLM (`VLMBoxes`), or a detector (`detectors.Detector`)."""

    @abstractmethod
    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        """Returns what was found of each sight, in order, at most 16 boxes each."""


def located(locator: Locator, sights: Sequence[Sight]) -> list[Found]:
    """Returns what a locator found; ContractError unless it is one Found each."""
    found = list(locator.locate(sights)) if sights else []
    if len(found) != len(sights) or not all(isinstance(each, Found) for each in found):
        raise ContractError(
            f"{type(locator).__name__} returned {len(found)} results for {len(sights)} sights: locate() must return"
            " one Found each, in order"
        )
    return found


def as_locator(value: Locator | VLM) -> Locator:
    """Returns a locator as it is, and a VLM as `VLMBoxes`; raises ConfigError for anything else."""
    if isinstance(value, VLM):
        return VLMBoxes(value)
    if isinstance(value, Locator):
        return value
    raise ConfigError(f"expected a Locator or a VLM, got {type(value).__name__}: give a Detector, VLMBoxes or a VLM")


SYSTEM = f"You find things in pictures and report exactly where they are. {GUARD}"
FRAMES: Mapping[Coordinates, str] = {
    "pixels": " Coordinates are pixels of this picture, which is {width} wide and {height} high.",
    "thousandths": " Coordinates run from 0 to 1000, along the picture's width and along its height.",
    "locations": "",
}
TOKENS = Text(
    "Answer with the location tokens of each of them and nothing else, or with none where there is none.",
    Boxes().max_tokens,
)
"""What is asked for instead of JSON where a family writes location tokens: held to JSON it could not write them."""


@final
@frozen
class VLMBoxes(Locator):
    """A vision-language model, asked one question a sight; boxes are read by its family's convention."""

    vlm: VLM
    largest_side: int = field(default=4 * TILE)
    """Pixels of the longest side of a picture that is sent; a multiple of 224, at least 448."""

    @largest_side.validator
    def _of_tiles(self, _: object, value: int) -> None:
        if value % TILE or value < SMALLEST_SIDE:
            raise ConfigError(f"largest_side must be a multiple of {TILE}, at least {SMALLEST_SIDE}, got {value}")

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        """Returns the boxes that the model reports, and None with a reason for a reply that is no list of boxes."""
        sent: dict[int, Image] = {}
        for sight in sights:
            if id(sight.image) not in sent:
                sent[id(sight.image)] = fitted(sight.image, self.largest_side)
        pictures = [sent[id(sight.image)] for sight in sights]
        replies = self.vlm.ask([self.question(s.name, picture) for s, picture in zip(sights, pictures, strict=True)])
        return [
            _found(reply, self.vlm.coordinates, picture.size) for reply, picture in zip(replies, pictures, strict=True)
        ]

    def question(self, name: str, picture: Image) -> Question:
        """Returns what is asked of a picture of fitting sides."""
        frame = FRAMES[self.vlm.coordinates].format(width=picture.width, height=picture.height)
        text = (
            f"Find everything in this picture that these words name:\n{quoted('name', name)}\n"
            f"Report one box for each of them, close around all of it that is visible.{frame}"
        )
        answer = TOKENS if self.vlm.coordinates == "locations" else Boxes()
        return Question(SYSTEM, text, (picture,), answer=answer, version=VERSION)


def fitted(image: Image, largest_side: int) -> Image:
    """Returns the picture in RGB, each side enlarged to a multiple of 224, from 448 to the largest."""
    sides = [min(max(math.ceil(side / TILE) * TILE, SMALLEST_SIDE), largest_side) for side in image.size]
    picture = image.convert("RGB")
    return picture if list(picture.size) == sides else picture.resize((sides[0], sides[1]))


def _found(reply: Reply, coordinates: Coordinates, size: tuple[int, int]) -> Found:
    if reply.note:
        return Found(None, reply.note, reply.cost)
    boxes, note = read_boxes(reply.text, coordinates, size)
    return Found(boxes, note, reply.cost)


def read_boxes(text: str, coordinates: Coordinates, size: tuple[int, int]) -> tuple[tuple[Box, ...] | None, str]:
    """Returns the boxes that a reply reports of a picture of this (width, height), or None and the reason.

    Reversed corners are swapped, boxes without area and repeated ones dropped, coordinates up to 2% beyond an edge
    clamped. A reply in another convention than its family's (all numbers at most 1, or far off the picture) is None:
    what it means would be a guess.
    """
    if not text.strip():
        return None, f"{REFUSED}: an empty reply"
    try:
        fractions = _located(text) if coordinates == "locations" else _listed(text, _frame(coordinates, size))
    except _OutOfRangeError as error:
        return None, f"{OUT_OF_RANGE}: {error}"
    except ValueError as error:
        return None, f"{UNPARSEABLE}: {error}"
    boxes = tuple(dict.fromkeys(box for each in fractions if (box := box_of(each))))
    return boxes[:MOST_BOXES], f"the first {MOST_BOXES} of {len(boxes)} boxes" if len(boxes) > MOST_BOXES else ""


def box_of(corners: Sequence[float]) -> Box | None:
    """Returns (x0, y0, x1, y1), in fractions of the picture, as a box on the canvas; None where it has no area."""
    xs, ys = ([round(min(max(corners[k + axis], 0.0), 1.0) * CANVAS) for k in (0, 2)] for axis in (0, 1))
    box = Box(min(xs), min(ys), max(xs), max(ys))
    return box if box.area else None


class _OutOfRangeError(ValueError):
    pass


def _frame(coordinates: Coordinates, size: tuple[int, int]) -> tuple[int, int]:
    return size if coordinates == "pixels" else (CANVAS, CANVAS)


def _listed(text: str, frame: tuple[int, int]) -> list[list[float]]:
    """Returns the boxes of a JSON reply, in fractions of the picture; ValueError for what is no list of boxes."""
    boxes = [_numbers(item) for item in _items(strict_json(text), text)]
    if boxes and all(abs(number) <= 1 for box in boxes for number in box):
        raise _OutOfRangeError(f"no number above 1 in {shown(text)}, expected {frame[0]}x{frame[1]} units")
    fractions = [[number / frame[k % 2] for k, number in enumerate(box)] for box in boxes]
    if any(not -SLACK <= part <= 1 + SLACK for box in fractions for part in box):
        raise _OutOfRangeError(f"{shown(text)} leaves the picture of {frame[0]}x{frame[1]} units")
    return fractions


def _items(found: Any, text: str) -> list[Any]:
    if isinstance(found, dict):
        found = found["boxes"] if "boxes" in found and not _keys(found) else [found]
    if not isinstance(found, list):
        raise ValueError(f"expected a list of boxes, got {shown(text)}")
    return found


def _numbers(item: Any) -> list[float]:
    keys = _keys(item) if isinstance(item, dict) else []
    if len(keys) != 1:
        raise ValueError(f"expected an object with one of {', '.join(BOX_KEYS)}, got {shown(repr(item))}")
    numbers = item[keys[0]]
    plain = isinstance(numbers, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not plain or len(numbers) != 4:
        raise ValueError(f"expected 4 numbers as a box, got {shown(repr(numbers))}")
    # Before they are floats: JSON has whole numbers that no float holds, and 1e999 is infinity.
    if not all(-1e6 < number < 1e6 for number in numbers):
        raise _OutOfRangeError(f"{shown(repr(numbers))} is no place in a picture")
    return [float(number) for number in numbers]


def _keys(item: Mapping[str, Any]) -> list[str]:
    return [key for key in BOX_KEYS if key in item]


_RUN = re.compile(r"(?:<loc_?[0-9]{1,4}>)+")
_TOKEN = re.compile(r"<loc(_?)([0-9]{1,4})>")


def _located(text: str) -> list[list[float]]:
    """Returns boxes of location tokens, in fractions: Florence-2's <loc_x0><loc_y0>.., or PaliGemma's <locYYYY>.."""
    if text.strip().rstrip(".").lower() == "none":
        return []
    runs = [_TOKEN.findall(run) for run in _RUN.findall(text)]
    if not runs and strict_json(text) == []:
        return []
    styles = {mark for run in runs for mark, _ in run}
    if len(styles) != 1 or any(len(run) % 4 for run in runs):
        raise ValueError(f"expected location tokens of one kind, by fours, got {shown(text)}")
    florence = styles == {"_"}
    num_bins = 1000 if florence else 1024
    bins = [[int(number) for _, number in run[k : k + 4]] for run in runs for k in range(0, len(run), 4)]
    if any(number >= num_bins for each in bins for number in each):
        raise _OutOfRangeError(f"{shown(text)} has locations beyond {num_bins - 1}")
    if florence:  # a box ends behind its last bins
        return [[x0 / num_bins, y0 / num_bins, (x1 + 1) / num_bins, (y1 + 1) / num_bins] for x0, y0, x1, y1 in bins]
    return [[x0 / num_bins, y0 / num_bins, x1 / num_bins, y1 / num_bins] for y0, x0, y1, x1 in bins]
