"""CLIP encoders with stock transformers classes: loaded once for equal settings, used from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional

from reasonrl import ConfigError, Trajectory
from reasonrl.judges.local_model import LOADING
from reasonrl.registry import one_line
from reasonrl_preference.files import tensors
from reasonrl_preference.open_clip import converted, is_open_clip
from reasonrl_preference.pictures import cropped, padded
from reasonrl_preference.settings import Precision


@frozen(eq=False)
class Encoder:
    """A CLIPModel in eval mode with its tokenizer and its pictures' preparation."""

    model: Any
    tokenizer: Any
    pixels: Callable[[Image], Tensor]
    """(C, H, W) float32 of a picture."""
    _lock: Any = field(factory=threading.Lock)  # a fast tokenizer sets its padding before it encodes

    def cosines(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Returns (N,) float32: how near each image is to its prompt, -1 to 1."""
        texts = [trajectory.prompt.text for trajectory in trajectories]
        distinct = list(dict.fromkeys(texts))  # a group shares its prompt
        rows = [distinct.index(text) for text in texts]
        images = self.image_embeddings([trajectory.image for trajectory in trajectories])
        return (images * self.text_embeddings(distinct)[rows]).sum(1).cpu()

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by: exp of its logit scale."""
        return float(self.model.logit_scale.detach().double().exp())

    @torch.no_grad()
    def image_embeddings(self, images: Sequence[Image | None]) -> Tensor:
        """Returns (N, D) float32 of unit length."""
        pixels = torch.stack([self.pixels(image) for image in images if image is not None])
        found = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return _unit(found)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Returns (N, D) float32 of unit length; a text longer than the model's positions (77 tokens) is cut."""
        length = self.model.config.text_config.max_position_embeddings
        with self._lock:
            tokens = self.tokenizer(
                list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
        ids, mask = tokens["input_ids"].to(self.model.device), tokens["attention_mask"].to(self.model.device)
        return _unit(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _unit(found: Any) -> Tensor:
    """Returns rows of unit length; newer transformers wrap the projected features in an output object."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return functional.normalize(features.float(), dim=-1)


def encoder(
    model: str,
    *,
    device: str | None,
    dtype: Precision,
    processor: str | None = None,
    weights: str | None = None,
    pad: bool = False,
) -> Encoder:
    """Returns the encoder of these settings, the same one each time while it is among the last four.

    `weights` replaces the model's own; `pad` shows pictures whole. Raises ConfigError where it cannot be loaded.
    """
    home = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with LOADING:
        try:
            return _loaded(model, processor or model, weights, pad, home, dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"cannot load CLIP {weights or model!r}: {one_line(error)[:300]}") from error


@lru_cache(maxsize=4)
def _loaded(model: str, processor: str, weights: str | None, pad: bool, device: str, dtype: Precision) -> Encoder:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    clip = CLIPModel.from_pretrained(model) if weights is None else _with_weights(model, weights)
    clip = clip.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
    pictures = CLIPImageProcessorPil.from_pretrained(processor)
    mean, deviation = torch.tensor(pictures.image_mean), torch.tensor(pictures.image_std)
    side = clip.config.vision_config.image_size
    prepare = (
        partial(padded, side=side, mean=mean, deviation=deviation) if pad else partial(cropped, processor=pictures)
    )
    return Encoder(clip, AutoTokenizer.from_pretrained(processor), prepare)


def _with_weights(model: str, weights: str) -> Any:
    """Returns a CLIPModel of the model's architecture with other weights, all of which must fit."""
    from transformers import CLIPConfig, CLIPModel

    if Path(weights).is_dir():
        return CLIPModel.from_pretrained(weights)
    config, found = CLIPConfig.from_pretrained(model), tensors(weights)
    acts = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if is_open_clip(found):
        if acts != {"gelu"}:
            raise ConfigError(f"{model} computes {sorted(acts)}, but open_clip's ViT-H-14 gelu: give its architecture")
        found = converted(found)
    clip, report = CLIPModel.from_pretrained(
        None, config=config, state_dict=found, output_loading_info=True, ignore_mismatched_sizes=True
    )  # mismatched: named below
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise ConfigError(f"{weights} does not fit the architecture of {model}: {wrong}")
    return clip
