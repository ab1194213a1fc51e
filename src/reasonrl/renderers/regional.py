"""Regional: each object's words are attended to from within its box, by masks in the denoiser's own attention.

No weights are added and none change, so it needs no training. The names of a plan's objects are encoded one by one and
stand behind the full text's tokens. A token of the image attends to the full text and, inside an object's box, to that
object's words too. With logits l of an image token over text tokens t, the attention is softmax(l_t + log m_t), where

    m_t = 1 for the full text, `strength` for the words of an object whose box holds the token, else 0.

In joint attention (SD3) texts are queries as well. The full text attends to the image and itself; an object's words to
the image inside the box and themselves. So within a layer nothing outside a box depends on its words; what the image's
tokens tell each other afterwards is theirs.

A cell of any resolution is inside a box if at least half of its width, and of its height, is; a box that is too small
for that keeps the cells that it covers most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from attrs import field, frozen, validators
from einops import rearrange, reduce, repeat
from torch import Tensor

from reasonrl.errors import ConfigError, ContractError
from reasonrl.plan import MAX_OBJECTS
from reasonrl.renderers.boxes import Area, Boxes, areas, classifier_free
from reasonrl.renderers.family import Brief

if TYPE_CHECKING:
    from reasonrl.renderers.family import Conditions, Family, Size

NOBODY, FULL_TEXT = 0, 1
"""What a text token belongs to: padding, the full text, or 2 + the object's number."""


@final
@frozen
class Regional(Boxes):
    """Regional prompts for Stable Diffusion 1.x, 2.x, XL (cross-attention) and 3.x (joint attention).

    A brief without boxes is drawn as the plain pipeline draws it, and so is the negative one. Processors are not saved:
    the denoiser that diffusers loads again is the plain one, with whatever was learned.
    """

    strength: float = field(default=1.0, validator=validators.and_(validators.ge(0.0), validators.lt(float("inf"))))
    """How much an object's words count within its box beside the full text's; 0 = the plain pipeline."""
    max_objects: int = field(default=8, validator=validators.and_(validators.ge(1), validators.le(MAX_OBJECTS)))
    """Each takes as many tokens as the full text; further ones are drawn from the full text alone."""

    def prepare(self, family: Family) -> None:
        """Wraps the denoiser's attention processors."""
        from diffusers import SD3Transformer2DModel, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0

        denoiser: Any = family.denoiser
        wrapper: type[RegionalCrossAttention] | type[RegionalJointAttention]
        known: tuple[type, ...]
        if isinstance(denoiser, UNet2DConditionModel):
            wrapper, known = RegionalCrossAttention, (AttnProcessor, AttnProcessor2_0)
        elif isinstance(denoiser, SD3Transformer2DModel):
            wrapper, known = RegionalJointAttention, (JointAttnProcessor2_0,)
        else:
            raise ConfigError(
                f"Regional masks UNet2DConditionModel and SD3Transformer2DModel, got {type(denoiser).__name__}: leave"
                " its boxes Native()"
            )
        plain = dict(denoiser.attn_processors)
        unknown = sorted({type(each).__name__ for each in plain.values() if not isinstance(each, known)})
        if unknown:
            raise ConfigError(
                f"Regional wraps {', '.join(kind.__name__ for kind in known)}, and the denoiser has"
                f" {', '.join(unknown)}: load it without IP-Adapters and fused projections"
            )
        denoiser.set_attn_processor({name: wrapper(each, self.strength) for name, each in plain.items()})

    def branches(self, guidance: float) -> dict[str, float]:
        """Returns {"full": w, "blank": 1 - w}."""
        return classifier_free(guidance)

    def conditions(
        self, family: Family, briefs: Sequence[Brief], negative: Brief, size: Size, guidance: float
    ) -> dict[str, list[Conditions]]:
        """Returns the family's conditions, "embeds" (L, D) with the objects' behind, and three for the attention.

        "attention.regions" (L,) int64 says whose each token is. "attention.rows" (R, H) and "attention.columns" (R, W)
        are the shares of the latents' rows and columns that each box covers. All may be padded with 0.
        """
        weights = self.branches(guidance)
        cells = family.latent_shape(size)[-2:]
        found: dict[str, list[Conditions]] = {}
        if weights["full"]:
            listed = [areas(brief.objects)[: self.max_objects] for brief in briefs]
            names = sorted({name for objects in listed for _, name, _ in objects})
            words = dict(zip(names, family.encode([Brief(name) for name in names], size), strict=True)) if names else {}
            found["full"] = [
                _with_regions(whole, [words[name] for _, name, _ in objects], [area for *_, area in objects], cells)
                for whole, objects in zip(family.encode(briefs, size), listed, strict=True)
            ]
        if weights.get("blank"):
            (whole,) = family.encode([negative], size)
            found["blank"] = [_with_regions(whole, [], [], cells)] * len(briefs)
        return found


def _with_regions(
    whole: Conditions, words: Sequence[Conditions], boxes: Sequence[Area], cells: tuple[int, ...]
) -> Conditions:
    if "embeds" not in whole:
        raise ContractError(f'Regional appends to a family\'s "embeds", and it encodes {", ".join(whole)} alone')
    texts = [whole["embeds"], *[each["embeds"] for each in words]]
    owners = [torch.full((len(text),), FULL_TEXT + number, device=text.device) for number, text in enumerate(texts)]
    height, width = cells
    return {
        **whole,
        "embeds": torch.cat(texts),
        "attention.regions": torch.cat(owners),
        "attention.rows": _covered([(y0, y1) for _, y0, _, y1 in boxes], height).to(texts[0].device),
        "attention.columns": _covered([(x0, x1) for x0, _, x1, _ in boxes], width).to(texts[0].device),
    }


def _covered(spans: Sequence[tuple[float, float]], num_cells: int) -> Tensor:
    """Returns (R, num_cells) float32: the share of each cell of the unit interval that each span covers."""
    first, last = (num_cells * torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)).split(1, dim=1)
    edges = torch.arange(num_cells + 1, dtype=torch.float64)
    return (torch.minimum(last, edges[1:]) - torch.maximum(first, edges[:-1])).clamp(min=0).float()


# ---- In the denoiser -----------------------------------------------------------------------------------


@final
@frozen
class RegionalCrossAttention:
    """The processor of a UNet's attention: the plain one, but where image tokens attend to texts with boxes."""

    plain: Any
    strength: float

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> Tensor:
        """Returns (K, Q, D) of (K, Q, D) image tokens and (K, L, D') text tokens."""
        if encoder_hidden_states is None or rows is None or columns is None or regions is None or not rows.shape[1]:
            plain: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return plain
        seen = words_seen(rows, columns, regions, hidden_states.shape[1], self.strength)
        query = _heads(attn, hidden_states, "to_q", "norm_q")
        key = _heads(attn, encoder_hidden_states, "to_k", "norm_k")
        value = _heads(attn, encoder_hidden_states, "to_v")
        return _projected(attn, _attended(query, key, value, seen, attention_mask))


@final
@frozen
class RegionalJointAttention:
    """The processor of SD3's attention, in which the tokens of image and texts attend to each other."""

    plain: Any
    strength: float

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns (K, Q, D) of the image, and (K, L, D) of the texts where they are given."""
        if encoder_hidden_states is None or rows is None or columns is None or regions is None or not rows.shape[1]:
            plain: Tensor | tuple[Tensor, Tensor] = self.plain(
                attn, hidden_states, encoder_hidden_states, attention_mask
            )
            return plain
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        seen = words_seen(rows, columns, regions, lengths[0], self.strength)
        query, key, value = (
            torch.cat([_heads(attn, hidden_states, *of_image), _heads(attn, encoder_hidden_states, *of_text)], dim=2)
            for of_image, of_text in (
                (("to_q", "norm_q"), ("add_q_proj", "norm_added_q")),
                (("to_k", "norm_k"), ("add_k_proj", "norm_added_k")),
                (("to_v",), ("add_v_proj",)),
            )
        )
        image, text = _attended(query, key, value, _joint(seen, regions), attention_mask).split(lengths, dim=1)
        return _projected(attn, image), text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, tokens: Tensor, projection: str, norm: str | None = None) -> Tensor:
    """Returns (K, heads, L, d)."""
    split = rearrange(getattr(attn, projection)(tokens), "k l (heads d) -> k heads l d", heads=attn.heads)
    normalise = getattr(attn, norm) if norm else None
    return split if normalise is None else normalise(split)


def _attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (K, Q, heads d) by softmax(logits + log m); one mask for all heads."""
    mask = seen.log().to(query.dtype)
    mask = rearrange(mask if bias is None else mask + bias, "k q l -> k 1 q l")
    return rearrange(F.scaled_dot_product_attention(query, key, value, mask), "k heads q d -> k q (heads d)")


def _projected(attn: Any, tokens: Tensor) -> Tensor:
    project, drop = attn.to_out
    found: Tensor = drop(project(tokens))
    return found


def words_seen(rows: Tensor, columns: Tensor, regions: Tensor, num_queries: int, strength: float) -> Tensor:
    """Returns m (K, Q, L) float32 of Q image tokens and L text tokens.

    The Q tokens are the latents' H x W, or those halved, rounding up, as often as it takes; else ContractError.
    """
    height, width = rows.shape[-1], columns.shape[-1]
    while rows.shape[-1] * columns.shape[-1] > num_queries:
        rows, columns = _halved(rows), _halved(columns)
    if rows.shape[-1] * columns.shape[-1] != num_queries:
        raise ContractError(
            f"attention over {num_queries} image tokens, expected {height} x {width} latents or their halves: the mask"
            " of Regional does not fit this denoiser"
        )
    inside = rearrange(_inside(rows), "k r h -> k r h 1") & rearrange(_inside(columns), "k r w -> k r 1 w")
    of_objects = strength * rearrange(inside, "k r h w -> k r (h w)").float()
    known = torch.tensor([0.0, 1.0], device=rows.device)  # NOBODY, FULL_TEXT
    table = torch.cat([repeat(known, "two -> k two q", k=len(rows), q=num_queries), of_objects], dim=1)
    whose = repeat(regions.long(), "k l -> k l q", q=num_queries)
    return rearrange(table.gather(1, whose), "k l q -> k q l")


def _inside(shares: Tensor) -> Tensor:
    return (shares >= 0.5) | (shares == shares.amax(-1, keepdim=True))


def _halved(shares: Tensor) -> Tensor:
    """Returns the shares of cells twice as large; the last one reaches beyond an odd number of cells."""
    return reduce(F.pad(shares, (0, shares.shape[-1] % 2)), "k r (cells two) -> k r cells", "mean", two=2)


def _joint(seen: Tensor, regions: Tensor) -> Tensor:
    """Returns (K, Q + L, Q + L): image to image 1, image to text m, text to image where m > 0, text to its like."""
    num_image = seen.shape[1]
    alike = rearrange(regions, "k l -> k l 1") == rearrange(regions, "k l -> k 1 l")
    of_image = torch.cat([seen.new_ones(len(seen), num_image, num_image), seen], dim=2)
    of_text = torch.cat([rearrange(seen > 0, "k q l -> k l q"), alike], dim=2)
    return torch.cat([of_image, of_text.to(seen.dtype)], dim=1)
