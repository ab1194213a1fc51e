"""Stock detectors of transformers behind `Locator`: Grounding DINO, MM-Grounding DINO and OWLv2, in this process.

Detector("IDEA-Research/grounding-dino-tiny").locate([Sight(image, "red cup")])
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

from attrs import evolve, field, frozen, validators
from einops import rearrange

from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.judges.grounding import MOST_BOXES, Found, Locator, Sight, box_of
from reasonrl.judges.local_model import LOADING
from reasonrl.plan import Box, plain_name

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

DINO = ("grounding-dino", "mm-grounding-dino")
OWL = ("owlv2",)
LONGEST_NAME = 100
"""Characters of a name that are looked for; a text encoder reads 16 tokens (OWLv2) or 256."""
GREY = (128, 128, 128)
"""What OWLv2 saw beside pictures that are not square when it was trained."""

_UNIT: Any = validators.and_(validators.ge(0), validators.le(1))


@final
@frozen
class Detector(Locator):
    """An open-vocabulary detector, asked for one name at a time: no label is a span of a neighbour's.

    Equal detectors share one model in memory. Weights are safetensors; no pickle and no code of the checkpoint runs.
    """

    checkpoint: str
    """A folder, or a Hub name: of Grounding DINO, MM-Grounding DINO or OWLv2 in transformers' format."""
    revision: str | None = None
    """A commit of a Hub name; None = the newest."""
    threshold: float = field(default=0.3, validator=_UNIT)
    """Score, in [0, 1], that a box must exceed; what the makers use: 0.3 for DINO, 0.1 to 0.3 for OWLv2."""
    most_overlap: float = field(default=0.5, validator=_UNIT)
    """IoU from which a box is a repetition of a better one of the same name, and dropped."""
    batch_size: int = field(default=8, validator=validators.ge(1))
    """Pictures in one forward pass."""
    device: str = "auto"
    """"auto" = "cuda" where there is one, else "cpu"."""

    def locate(self, sights: Sequence[Sight]) -> list[Found]:
        """Returns the boxes of each name, the best first; never None: a detector always looks."""
        words = [searched(sight.name) for sight in sights]
        found = {
            i: Found((), f"no words to look for in {sight.name!r}") for i, sight in enumerate(sights) if not words[i]
        }
        eyes = _loaded(self.checkpoint, self.revision, self.device) if len(found) < len(sights) else None
        rows = [(i, sight.image, words[i]) for i, sight in enumerate(sights) if words[i]]
        for batch in _batches(rows, self.batch_size, together=eyes is not None and eyes.family in OWL):
            assert eyes is not None
            begun = time.perf_counter()
            answers = [self._kept(*answer) for answer in eyes.look(batch)]
            cost = {"calls": 1.0, "seconds": (time.perf_counter() - begun) / len(answers)}
            numbers = [i for row in batch for i, _ in row.names]
            found |= {i: evolve(answer, cost=cost) for i, answer in zip(numbers, answers, strict=True)}
        return [found[i] for i in range(len(sights))]

    def _kept(self, scores: Tensor, corners: Tensor) -> Found:
        """Returns the boxes above the threshold; `corners` are fractions of the picture."""
        above = scores > self.threshold
        ranked = sorted(zip(scores[above].tolist(), corners[above].tolist(), strict=True), key=lambda each: -each[0])
        boxes = (box_of(each) for _, each in ranked)
        return Found(distinct((box for box in boxes if box), self.most_overlap))


def distinct(boxes: Iterable[Box], most_overlap: float) -> tuple[Box, ...]:
    """Returns boxes, best first, without those that overlap a better one by this IoU or more; at most 16."""
    kept: list[Box] = []
    for box in boxes:
        if len(kept) == MOST_BOXES:
            break
        if all(box.iou(other) < most_overlap for other in kept):
            kept.append(box)
    return tuple(kept)


def searched(name: str) -> str:
    """Returns a name as it is looked for: `plain_name`, without what ends or separates names in a query."""
    return plain_name(re.sub(r"[.?;!<>|\[\]]+", " ", name[:LONGEST_NAME]))


@frozen(eq=False)
class _Row:
    """A picture, and what to look for in it: (number of the sight, words)."""

    image: Image
    names: tuple[tuple[int, str], ...]


def _batches(rows: Sequence[tuple[int, Image, str]], size: int, *, together: bool) -> Iterator[list[_Row]]:
    """Yields rows of pictures of one size, so that none is padded for another's sake; OWLv2 takes all names at once."""
    groups: dict[Any, list[tuple[int, str]]] = {}
    images: dict[Any, Image] = {}
    for i, image, words in rows:
        key = id(image) if together else i
        groups.setdefault(key, []).append((i, words))
        images[key] = image
    by_size: dict[tuple[int, int], list[_Row]] = {}
    for key, names in groups.items():
        by_size.setdefault(images[key].size, []).append(_Row(images[key], tuple(names)))
    for alike in by_size.values():
        yield from (alike[k : k + size] for k in range(0, len(alike), size))


@frozen(eq=False)
class _Eyes:
    """A loaded model."""

    family: str
    processor: Any
    model: Any
    device: str

    def look(self, rows: Sequence[_Row]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields, for each name of each row, (Q,) scores in [0, 1] and (Q, 4) corners in fractions of the picture."""
        import torch

        inputs = (self._owl_inputs if self.family in OWL else self._dino_inputs)(rows)
        with torch.no_grad():
            outputs = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        scores = outputs.logits.float().sigmoid()
        middle, half = outputs.pred_boxes.float()[..., :2], outputs.pred_boxes.float()[..., 2:] / 2
        corners = torch.cat([middle - half, middle + half], -1).cpu()
        for k, row in enumerate(rows):
            frame = self._frame(row.image)
            for column, _ in enumerate(row.names):
                of_name = scores[k, :, column] if self.family in OWL else scores[k].amax(-1)
                yield of_name.cpu(), corners[k] * torch.tensor(frame)

    def _frame(self, image: Image) -> list[float]:
        """Returns what of the picture one unit of the model's boxes is: OWLv2 sees a square, padded below and right."""
        square = max(image.size) if self.family in OWL else 0
        return [square / side if square else 1.0 for side in (*image.size, *image.size)]

    def _dino_inputs(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        images = [row.image.convert("RGB") for row in rows]
        texts = [f"{words}." for row in rows for _, words in row.names]
        longest = self.model.config.max_text_len
        inputs = self.processor(
            images=images, text=texts, return_tensors="pt", padding=True, truncation=True, max_length=longest
        )
        return dict(inputs)

    def _owl_inputs(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        import torch

        pixels = torch.stack([self._owl_pixels(row.image) for row in rows])
        most = max(len(row.names) for row in rows)
        texts = [[words for _, words in row.names] + [" "] * (most - len(row.names)) for row in rows]
        tokens = self.processor.tokenizer(
            [f"a photo of a {words}" for row in texts for words in row],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        )
        return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _owl_pixels(self, image: Image) -> Tensor:
        """Returns the stock processor's pixels, but resized by Pillow: it would take SciPy or torchvision."""
        import numpy as np
        import torch
        from PIL.Image import Resampling

        stock = self.processor.image_processor
        square = _squared(image).resize((stock.size["width"], stock.size["height"]), Resampling.BILINEAR)
        scaled = torch.from_numpy(np.array(square, np.float32)) * stock.rescale_factor
        normal = (scaled - torch.tensor(stock.image_mean)) / torch.tensor(stock.image_std)
        return rearrange(normal, "h w c -> c h w")


def _squared(image: Image) -> Image:
    from PIL import Image as pictures

    side = max(image.size)
    square = pictures.new("RGB", (side, side), GREY)
    square.paste(image.convert("RGB"), (0, 0))
    return square


def _loaded(checkpoint: str, revision: str | None, device: str) -> _Eyes:
    with LOADING:
        return _load(checkpoint, revision, device)


@lru_cache(maxsize=2)
def _load(checkpoint: str, revision: str | None, device: str) -> _Eyes:
    import torch
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        family = AutoConfig.from_pretrained(checkpoint, revision=revision).model_type
        if family not in (*DINO, *OWL):
            raise ConfigError(f"{checkpoint} is a {family}, expected one of {', '.join((*DINO, *OWL))}")
        processor = AutoProcessor.from_pretrained(checkpoint, revision=revision)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(
            checkpoint, revision=revision, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no detector could be loaded from {checkpoint}: {' '.join(str(error).split())}"
        ) from error
    return _Eyes(family, processor, model.to(device).eval(), device)
