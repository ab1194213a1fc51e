"""What the nano flow has in the place of a VAE and of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from reasonrl.plan import BOX_START, CANVAS, OBJ_START, Box, PlannedObject
from reasonrl.scenes import codec, nano
from reasonrl.scenes.grammar import ARTICLES
from reasonrl.scenes.world import CELLS, COLORS, PATCH, SHAPES, SIZES, SOLID, STEP, TEXTURES, sprite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOLID_FRAC = 0.65
"""How many objects of training scenes are solid, about: their patches weigh as much in the latents."""
DRAWN_FRAC = 0.22
"""How many cells of training scenes are not empty, about."""
MOST_WORDS = 32
"""Words read of a text, and of a name."""
MOST_OBJECTS = 8
"""Planned objects read."""


# ---- Latents -----------------------------------------------------------------------------------------


@final
class PatchLatents(nn.Module):
    """Pictures to (C, 8, 8) latents of about unit variance, and back by the nearest patch of the codebook."""

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.config = {"channels": channels}
        self.register_buffer("mean", torch.zeros(PATCH * PATCH * 3))
        self.register_buffer("projection", torch.zeros(PATCH * PATCH * 3, channels))
        self.mean: Tensor
        self.projection: Tensor

    def codes(self) -> Tensor:
        """Returns the latents of every patch, (1101, C)."""
        return self.project(torch.from_numpy(codec.codebook().copy()).to(self.mean.device))

    def project(self, patches: Tensor) -> Tensor:
        """Returns (N, C) of (N, 8, 8, 3) uint8 patches."""
        return (rearrange(patches, "n h w c -> n (h w c)") / 255 - self.mean) @ self.projection

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns (N, C, 8, 8) of 64x64 pictures; those that `world.draw` made come back without loss."""
        return self.of_tokens(torch.stack([torch.from_numpy(codec.nearest(image)) for image in images]))

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Returns (N, C, 8, 8) of (N, 64) image tokens."""
        return rearrange(self.codes()[tokens.to(self.mean.device)], "n (h w) c -> n c h w", h=CELLS)

    def tokens(self, latents: Tensor) -> Tensor:
        """Returns the (N, 64) tokens of the nearest patches."""
        codes = self.codes()
        flat = rearrange(latents.to(codes), "n c h w -> (n h w) c")
        nearest = (codes.square().sum(1) - 2 * flat @ codes.T).argmin(1)
        return rearrange(nearest, "(n k) -> n k", k=codec.NUM_TOKENS)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Returns 64x64 pictures, whatever the latents."""
        return [codec.decode(row) for row in self.tokens(latents).cpu().numpy()]


def principal_latents(channels: int) -> PatchLatents:
    """Returns whitened principal components of the patches, weighted by how often sprites have them.

    All channels have one scale, set so that data have unit variance with the empty cells among them. Eigenvectors
    are unique up to rotation only, so a trained flow has to be saved with them.
    """
    patches, weights = _patches_of_sprites()
    plain = codec.codebook()[codec.PLAIN].reshape(-1) / 255
    mean = weights @ patches
    centred = patches - mean
    variances, axes = np.linalg.eigh(centred.T @ (centred * weights[:, None]))
    projection = axes[:, : -channels - 1 : -1] / np.sqrt(variances[: -channels - 1 : -1])
    # Cells that are drawn on have variance 1, and the empty ones are a constant away.
    drawn, gap = DRAWN_FRAC, (plain - mean) @ projection
    scale = np.sqrt(drawn + drawn * (1 - drawn) * np.mean(gap**2))
    latents = PatchLatents(channels=channels)
    latents.mean.copy_(torch.from_numpy(mean + (1 - drawn) * (plain - mean)))
    latents.projection.copy_(torch.from_numpy(projection / scale))
    return latents


def _patches_of_sprites() -> tuple[np.ndarray, np.ndarray]:
    """Returns (K, 192) patches in [0, 1] without the empty ones, and how often drawn cells have each, sum 1."""
    found, weights = [], []
    for texture, shape, color, size in product(TEXTURES, SHAPES, COLORS, SIZES.values()):
        here = codec.patches(sprite(shape, color, texture, size)).reshape(-1, PATCH * PATCH * 3) / 255
        here = here[(here != codec.codebook()[codec.PLAIN].reshape(-1) / 255).any(1)]
        share = SOLID_FRAC if texture == SOLID else (1 - SOLID_FRAC) / (len(TEXTURES) - 1)
        found.append(here)
        weights.append(np.full(len(here), share))
    every = np.concatenate(weights)
    return np.concatenate(found), every / every.sum()


# ---- Conditions --------------------------------------------------------------------------------------


@final
class Conditioner(nn.Module):
    """Reads texts and planned objects as tokens, their mean, and a map of the boxes over the cells.

    Of a text it reads the words before the first mark of a plan, at most 32: the plan comes as objects. Of objects it
    reads the first 8: their names without articles, and their boxes, cut to the canvas; a box with nothing left is
    none. What is absent is a learned token, so no row depends on the others.
    """

    def __init__(self, *, width: int = 64, map_channels: int = 24, text_tokens: int = 6, num_layers: int = 2) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "map_channels": map_channels,
            "text_tokens": text_tokens,
            "num_layers": num_layers,
        }
        self.width, self.map_channels = width, map_channels
        self.words = nn.Embedding(len(_tokenizer()), width, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(text_tokens + MOST_WORDS, width))
        self.readers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.names = nn.Embedding(len(_tokenizer()), width, padding_idx=0)
        self.boxes = nn.Sequential(nn.Linear(36, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.no_box = nn.Parameter(0.1 * torch.randn(width))
        self.no_object = nn.Parameter(0.1 * torch.randn(width))
        self.objects = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.painter = nn.Sequential(nn.Linear(width + 4, 2 * width), nn.SiLU(), nn.Linear(2 * width, map_channels))

    def forward(self, words: Tensor, names: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Returns "embeds" (N, 14, D), "pooled" (N, D) and "map" (N, M, 8, 8) of what `read` returns."""
        named = self.names(names).sum(2)
        boxed = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
        box = torch.where(boxed, self.boxes(_waves(boxes)), self.no_box)
        present = (names != 0).any(2)[..., None]
        objects = torch.where(present, self.objects(named + box), self.no_object)
        embeds = torch.cat([self._text(words), objects], 1)
        return {"embeds": embeds, "pooled": embeds.mean(1), "map": self._map(named, boxes)}

    def _text(self, words: Tensor) -> Tensor:
        """Returns the learned tokens at the front, after they have read the words."""
        num = len(self.places) - MOST_WORDS
        front = torch.zeros(len(words), num, self.width, device=words.device)
        tokens = torch.cat([front, self.words(words)], 1) + self.places
        absent = nn.functional.pad(words == 0, (num, 0))
        for reader in self.readers:
            tokens = reader(tokens, src_key_padding_mask=absent)
        return tokens[:, :num]

    def _map(self, named: Tensor, boxes: Tensor) -> Tensor:
        """Returns the sum over objects of what a cell is to them, by its distances from the edges, where covered."""
        near = torch.arange(CELLS, device=boxes.device) * float(STEP)
        x0, y0, x1, y1 = (edge[..., None] for edge in boxes.unbind(-1))
        across, down = _shared(x0, x1, near), _shared(y0, y1, near)  # (N, K, 8) in [0, 1]
        covered = torch.einsum("nky,nkx->nkyx", down, across)
        n, k, y, x = covered.nonzero(as_tuple=True)
        box = boxes[n, k]
        middle = torch.stack([near[x], near[y]], -1) + STEP / 2
        offsets = torch.cat([middle - box[:, :2], box[:, 2:] - middle], -1).div(2 * STEP).clamp(-2, 2)
        painted = self.painter(torch.cat([named[n, k], offsets], -1)) * covered[n, k, y, x, None]
        canvas = painted.new_zeros(len(boxes), CELLS, CELLS, self.map_channels)
        return rearrange(canvas.index_put((n, y, x), painted, accumulate=True), "n y x m -> n m y x")

    def read(self, texts: Sequence[str], objects: Sequence[Sequence[PlannedObject]]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids of words (N, 32), of names (N, 8, 32), and boxes (N, 8, 4) as `forward` takes them."""
        names = torch.zeros(len(texts), MOST_OBJECTS, MOST_WORDS, dtype=torch.int64)
        boxes = torch.zeros(len(texts), MOST_OBJECTS, 4)
        words = torch.stack([_ids(text.split(OBJ_START)[0].split(BOX_START)[0]) for text in texts])
        for row, planned in enumerate(objects):
            for slot, item in enumerate(planned[:MOST_OBJECTS]):
                names[row, slot] = _ids(" ".join(w for w in item.name.split() if w.lower() not in ARTICLES))
                if item.box is not None:
                    boxes[row, slot] = torch.tensor(_on_canvas(item.box))
        device = self.no_box.device
        return words.to(device), names.to(device), boxes.to(device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], objects: Sequence[Sequence[PlannedObject]]) -> list[dict[str, Tensor]]:
        """Returns each row's conditions, as `forward` names them, without the leading axis."""
        found = self(*self.read(texts, objects))
        return [{name: value[row] for name, value in found.items()} for row in range(len(texts))]


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return nano.build_tokenizer()


@lru_cache(maxsize=4096)
def _ids(text: str) -> Tensor:
    """Returns (32,) ids of the first words, 0 behind them."""
    ids: list[int] = _tokenizer()(text)["input_ids"][:MOST_WORDS]
    return torch.tensor(ids + [0] * (MOST_WORDS - len(ids)))


def _on_canvas(box: Box) -> list[float]:
    return [float(min(max(edge, 0), CANVAS)) for edge in (box.x0, box.y0, box.x1, box.y1)]


def _shared(low: Tensor, high: Tensor, near: Tensor) -> Tensor:
    """Returns which part of each cell, from `near` on, lies between two edges."""
    return (torch.minimum(high, near + STEP) - torch.maximum(low, near)).clamp(min=0) / STEP


def _waves(boxes: Tensor) -> Tensor:
    """Returns (N, K, 36): each edge in [0, 1], and sines and cosines of 4 octaves of it."""
    edges = boxes / CANVAS
    angles = edges[..., None] * torch.pi * 2.0 ** torch.arange(4, device=boxes.device)
    return torch.cat([edges, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)
