from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import Image
from torch import Tensor

from reasonrl.errors import ConfigError, ContractError
from reasonrl.plan import Box, PlannedObject
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size
from reasonrl.renderers.regional import (
    Regional,
    RegionalCrossAttention,
    RegionalJointAttention,
    words_seen,
)

SIZE = (64, 96)
"""Latents of 8 x 12."""
WORDS = 3
moderate = settings(max_examples=60, deadline=None)
CAT, VASE = PlannedObject("cat", Box(0, 0, 250, 500)), PlannedObject("vase", Box(500, 500, 1000, 1000))


class Tiny(Family):
    """A tiny denoiser of diffusers; a text is random numbers of its own."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__(SimpleNamespace(denoiser=denoiser))
        self.asked: list[str] = []

    @property
    def denoiser(self) -> Any:
        return self.pipe.denoiser

    @property
    def size(self) -> Size:
        return SIZE

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return 4, size[0] // 8, size[1] // 8

    def encode(self, briefs: list[Brief], size: Size) -> list[dict[str, Tensor]]:
        self.asked += [brief.text for brief in briefs]
        return [{"embeds": text(brief.text), "pooled": torch.ones(8)} for brief in briefs]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        raise NotImplementedError

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        attention = {k.removeprefix("attention."): v for k, v in conditions.items() if k.startswith("attention.")}
        joint = hasattr(self.denoiser, "pos_embed")
        more = {"joint_attention_kwargs" if joint else "cross_attention_kwargs": attention or None}
        if joint:
            more["pooled_projections"] = conditions["pooled"]
        return self.denoiser(x, timestep=inputs, encoder_hidden_states=conditions["embeds"], return_dict=False, **more)[
            0
        ]

    def decode(self, latents: Tensor) -> list[Image]:
        raise NotImplementedError


def text(words: str) -> Tensor:
    return torch.randn(WORDS, 8, generator=torch.Generator().manual_seed(sum(words.encode())))


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
    ).eval()


def transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


BOTH = pytest.mark.parametrize("build", [unet, transformer])


def latents(rows: int = 1) -> Tensor:
    return torch.randn(rows, 4, 8, 12, generator=torch.Generator().manual_seed(2))


def conditions(family: Family, *briefs: Brief, boxes: Regional | None = None) -> list[Conditions]:
    return (boxes or Regional()).conditions(family, briefs, Brief("ugly"), SIZE, 1.0)["full"]


def predicted(family: Family, x: Tensor, *rows: Conditions) -> Tensor:
    return family.predict(x, torch.full((len(x),), 7.0), family.collate(rows))


# ---- The mask ------------------------------------------------------------------------------------------


def seen_of(boxes: list[Box], num_queries: int, *, strength: float = 1.0) -> Tensor:
    """Returns (Q, WORDS (1 + R)) of 8 x 12 latents."""
    brief = Brief("x", tuple(PlannedObject(f"thing {number}", box) for number, box in enumerate(boxes)))
    (row,) = conditions(Tiny(None), brief)
    parts = (row[f"attention.{name}"][None] for name in ("rows", "columns", "regions"))
    return words_seen(*parts, num_queries, strength)[0]


def test_full_text_is_seen_everywhere_and_an_objects_words_inside_its_box_alone() -> None:
    seen = seen_of([CAT.box, VASE.box], 96).reshape(8, 12, 3, WORDS)
    assert (seen[:, :, 0] == 1).all()
    cat, vase = torch.zeros(8, 12, WORDS), torch.zeros(8, 12, WORDS)
    cat[:4, :3] = 1
    vase[4:, 6:] = 1
    assert torch.equal(seen[:, :, 1], cat)
    assert torch.equal(seen[:, :, 2], vase)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)])
def test_mask_follows_the_box_to_every_resolution(height: int, width: int) -> None:
    seen = seen_of([Box(0, 0, 500, 1000)], height * width).reshape(height, width, 2 * WORDS)[..., WORDS]
    expected = torch.zeros(height, width)
    expected[:, : (width + 1) // 2] = 1
    assert torch.equal(seen, expected)


@moderate
@given(*[st.integers(0, 990)] * 2, *[st.integers(10, 1000)] * 2, st.sampled_from([96, 24, 6, 2, 1]))
def test_no_object_vanishes_at_any_resolution_nor_grows_by_a_whole_cell(
    x0: int, y0: int, width: int, height: int, num_queries: int
) -> None:
    box = Box(x0, y0, min(x0 + width, 1000), min(y0 + height, 1000))
    cells = {96: (8, 12), 24: (4, 6), 6: (2, 3), 2: (1, 2), 1: (1, 1)}[num_queries]
    seen = seen_of([box], num_queries).reshape(*cells, -1)[..., WORDS]
    assert seen.any()
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    halvings = [8, 4, 2, 1, 1].index(cells[0]) if num_queries > 1 else 4
    for found, low, high, num_cells in ((rows, box.y0, box.y1, 8), (columns, box.x0, box.x1, 12)):
        side = 2**halvings / num_cells  # of a cell, in canvases: the last may reach beyond
        assert (found * side * 1000 < high).all()
        assert ((found + 1) * side * 1000 > low).all()


def test_strength_weighs_an_objects_words_alone() -> None:
    plain, strong = seen_of([CAT.box], 24), seen_of([CAT.box], 24, strength=3.0)
    assert torch.equal(strong[:, :WORDS], plain[:, :WORDS])
    assert torch.equal(strong[:, WORDS:], 3 * plain[:, WORDS:])


def test_box_drawn_by_hand_is_clipped_to_the_canvas() -> None:
    assert torch.equal(seen_of([Box(-700, -20, 250, 500)], 96), seen_of([CAT.box], 96))


def test_queries_that_no_halving_gives_are_refused() -> None:
    with pytest.raises(ContractError, match="attention over 35 image tokens, expected 8 x 12 latents"):
        seen_of([CAT.box], 35)


# ---- One layer -----------------------------------------------------------------------------------------


class CrossLayer:
    """A UNet's cross-attention over 8 x 12 image tokens."""

    def __init__(self, strength: float = 1.0) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0

        torch.manual_seed(3)
        self.attention = Attention(8, cross_attention_dim=8, heads=2, dim_head=4).double()
        self.attention.set_processor(RegionalCrossAttention(AttnProcessor2_0(), strength))

    def __call__(self, row: Conditions, x: Tensor) -> Tensor:
        return self.attention(x, encoder_hidden_states=row["embeds"][None].double(), **of_attention(row))


class JointLayer:
    """SD3's attention over 8 x 12 image tokens; returns those alone."""

    def __init__(self, strength: float = 1.0) -> None:
        from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

        torch.manual_seed(3)
        self.attention = Attention(
            8, added_kv_proj_dim=8, heads=2, dim_head=4, out_dim=8, context_pre_only=False, qk_norm="rms_norm"
        ).double()
        self.attention.set_processor(RegionalJointAttention(JointAttnProcessor2_0(), strength))

    def __call__(self, row: Conditions, x: Tensor) -> Tensor:
        return self.both(row, x)[0]

    def both(self, row: Conditions, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, encoder_hidden_states=row["embeds"][None].double(), **of_attention(row))


LAYERS = pytest.mark.parametrize("build", [CrossLayer, JointLayer])


def of_attention(row: Conditions) -> dict[str, Tensor]:
    return {name: row[f"attention.{name}"][None] for name in ("rows", "columns", "regions")}


def image_tokens() -> Tensor:
    return torch.randn(1, 96, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def cells_changed(one: Tensor, other: Tensor) -> Tensor:
    return (one != other).any(-1).reshape(8, 12)


@LAYERS
def test_token_outside_every_box_is_unaffected_by_an_objects_words(build: Any) -> None:
    layer, x, family = build(), image_tokens(), Tiny(None)
    (cat,), (dog,) = (
        conditions(family, Brief("x", (PlannedObject(name, CAT.box), VASE))) for name in ("cat", "dragon")
    )
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[:4, :3] = True
    assert torch.equal(cells_changed(layer(cat, x), layer(dog, x)), inside)


@LAYERS
def test_moving_a_box_changes_the_cells_it_leaves_and_those_it_enters(build: Any) -> None:
    layer, x, family = build(), image_tokens(), Tiny(None)
    (here,), (there,) = (
        conditions(family, Brief("x", (PlannedObject("cat", box), VASE))) for box in (CAT.box, Box(167, 0, 417, 500))
    )
    moved = torch.zeros(8, 12, dtype=torch.bool)
    moved[:4, :2] = moved[:4, 3:5] = True
    changed = cells_changed(layer(here, x), layer(there, x))
    assert torch.equal(changed, moved)


@LAYERS
def test_each_token_attends_as_to_the_full_text_and_its_objects_words_alone(build: Any) -> None:
    layer, x, family = build(), image_tokens(), Tiny(None)
    (row,) = conditions(family, Brief("x", (CAT, VASE)))
    found = layer(row, x).reshape(8, 12, 8)
    everywhere = {"outside": [text("x")], "cat": [text("x"), text("cat")], "vase": [text("x"), text("vase")]}
    for name, cell in {"outside": (0, 5), "cat": (3, 2), "vase": (4, 6)}.items():
        plain = torch.cat(everywhere[name])
        alone = layer.attention.processor.plain(layer.attention, x, encoder_hidden_states=plain[None].double())
        expected = alone[0] if isinstance(alone, tuple) else alone
        torch.testing.assert_close(found[cell], expected.reshape(8, 12, 8)[cell], rtol=1e-12, atol=1e-12)


def test_strength_multiplies_the_attention_an_objects_words_get_before_it_is_normalised() -> None:
    x, family = image_tokens(), Tiny(None)
    (row,) = conditions(family, Brief("x", (CAT,)))
    found = CrossLayer(strength=2.5)(row, x)
    attention = CrossLayer().attention
    split = [
        each.reshape(-1, 2, 4).transpose(0, 1)
        for each in (
            attention.to_q(x[0]),
            attention.to_k(row["embeds"].double()),
            attention.to_v(row["embeds"].double()),
        )
    ]
    query, key, value = split
    weights = (query @ key.transpose(1, 2) / 2).exp() * seen_of([CAT.box], 96, strength=2.5)
    mixed = (weights / weights.sum(-1, keepdim=True) @ value).transpose(0, 1).reshape(96, 8)
    torch.testing.assert_close(found[0], attention.to_out[0](mixed), rtol=0, atol=1e-7)


@LAYERS
def test_strength_of_zero_is_the_plain_layer(build: Any) -> None:
    layer, x, family = build(strength=0.0), image_tokens(), Tiny(None)
    (row,), (bare,) = conditions(family, Brief("x", (CAT, VASE))), conditions(family, Brief("x"))
    torch.testing.assert_close(layer(row, x), layer(bare, x), rtol=1e-12, atol=1e-12)


def test_full_text_in_joint_attention_does_not_hear_of_the_objects_words() -> None:
    layer, x, family = JointLayer(), image_tokens(), Tiny(None)
    (cat,), (dragon,), (bare,) = (
        conditions(family, Brief("x", objects))
        for objects in ((CAT, VASE), (PlannedObject("dragon", CAT.box), VASE), ())
    )
    (_, of_cat), (_, of_dragon), (_, of_none) = (layer.both(row, x) for row in (cat, dragon, bare))
    assert torch.equal(of_cat[:, :WORDS], of_dragon[:, :WORDS])
    assert not torch.equal(of_cat[:, WORDS : 2 * WORDS], of_dragon[:, WORDS : 2 * WORDS])
    torch.testing.assert_close(of_cat[:, :WORDS], of_none, rtol=1e-12, atol=1e-12)


def test_objects_words_in_joint_attention_hear_of_the_image_inside_the_box_alone() -> None:
    layer, x, family = JointLayer(), image_tokens(), Tiny(None)
    (row,) = conditions(family, Brief("x", (CAT, VASE)))
    elsewhere = x.clone()
    elsewhere[0, 5] += 1.0  # in the top row, in no box
    (_, words), (_, again) = layer.both(row, x), layer.both(row, elsewhere)
    changed = (words != again).any(-1)[0].reshape(3, WORDS).any(1)
    assert changed.tolist() == [True, False, False]
    elsewhere[0, 0] += 1.0  # in the cat's
    changed = (words != layer.both(row, elsewhere)[1]).any(-1)[0].reshape(3, WORDS).any(1)
    assert changed.tolist() == [True, True, False]


@LAYERS
def test_padding_for_rows_of_fewer_objects_changes_nothing(build: Any) -> None:
    layer, x, family = build(), image_tokens(), Tiny(None)
    one, three = conditions(family, Brief("x", (CAT,)), Brief("y", (VASE, CAT, VASE)))
    padded = {name: value[0] for name, value in family.collate([one, three]).items()}
    assert len(padded["embeds"]) == 4 * WORDS
    torch.testing.assert_close(layer(padded, x), layer(one, x), rtol=1e-12, atol=1e-12)


# ---- The denoiser --------------------------------------------------------------------------------------


@BOTH
def test_without_objects_it_is_the_plain_pipeline(build: Any) -> None:
    family, x = Tiny(build()), latents(2)
    plain = predicted(family, x, *family.encode([Brief("x"), Brief("y")], SIZE))
    Regional().prepare(family)
    bare = conditions(family, Brief("x"), Brief("y", (PlannedObject("cat", None),)))
    assert torch.equal(predicted(family, x, *bare), plain)
    mixed = conditions(family, Brief("x"), Brief("y", (CAT, VASE)))
    beside = predicted(family, x, *mixed)
    torch.testing.assert_close(beside[0], plain[0], rtol=1e-4, atol=1e-5)
    assert (beside[1] - plain[1]).abs().max() > 1e-3


@BOTH
def test_negative_is_drawn_unmasked_and_encoded_once(build: Any) -> None:
    family, x, boxes = Tiny(build()), latents(1), Regional()
    (written,) = family.encode([Brief("ugly")], SIZE)
    plain = predicted(family, x, written)
    boxes.prepare(family)
    family.asked.clear()
    found = boxes.conditions(family, [Brief("x", (CAT,)), Brief("y", (CAT, VASE))], Brief("ugly"), SIZE, 4.5)
    assert boxes.branches(4.5) == {"full": 4.5, "blank": -3.5}
    assert sorted(family.asked) == ["cat", "ugly", "vase", "x", "y"]
    first, second = found["blank"]
    assert all(first[name] is second[name] for name in first)
    assert torch.equal(predicted(family, x, first), plain)
    both = predicted(family, latents(2), found["full"][1], first)  # of one batch, with objects and without
    torch.testing.assert_close(both[1:], predicted(family, latents(2)[1:], first), rtol=1e-4, atol=1e-5)


@BOTH
def test_renaming_and_moving_an_object_change_the_prediction(build: Any) -> None:
    family, x = Tiny(build()), latents(1)
    Regional().prepare(family)
    rows = conditions(
        family,
        Brief("x", (CAT,)),
        Brief("x", (PlannedObject("dragon", CAT.box),)),
        Brief("x", (PlannedObject("cat", VASE.box),)),
    )
    here, renamed, moved = (predicted(family, x, row) for row in rows)
    assert (here - renamed).abs().max() > 1e-4
    assert (here - moved).abs().max() > 1e-4


@BOTH
def test_adapters_added_later_learn_and_the_objects_words_get_a_gradient(build: Any) -> None:
    from peft import LoraConfig

    family, x = Tiny(build()), latents(1)
    Regional().prepare(family)
    family.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    (row,) = conditions(family, Brief("x", (CAT,)))
    row = {**row, "embeds": row["embeds"].clone().requires_grad_()}
    predicted(family, x, row).square().mean().backward()
    assert row["embeds"].grad[WORDS:].abs().max() > 0
    learned = [p.grad for name, p in family.denoiser.named_parameters() if "lora_B" in name]
    assert learned
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in learned)
    assert any(gradient.any() for gradient in learned)


@BOTH
def test_gradient_checkpointing_gives_the_same_gradient(build: Any) -> None:
    family, x = Tiny(build()), latents(1)
    Regional().prepare(family)
    (row,) = conditions(family, Brief("x", (CAT, VASE)))

    def gradients() -> list[Tensor]:
        family.denoiser.train().zero_grad()
        predicted(family, x, row).square().mean().backward()
        return [p.grad.clone() for p in family.denoiser.parameters() if p.grad is not None]

    plain = gradients()
    family.denoiser.enable_gradient_checkpointing()
    for again, before in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-7)


@BOTH
def test_denoiser_saves_as_the_plain_one(build: Any, tmp_path: Path) -> None:
    family, x = Tiny(build()), latents(1)
    (written,) = family.encode([Brief("x")], SIZE)
    plain = predicted(family, x, written)
    Regional().prepare(family)
    family.denoiser.save_pretrained(tmp_path)
    again = Tiny(type(family.denoiser).from_pretrained(tmp_path).eval())
    assert not any("Regional" in type(each).__name__ for each in again.denoiser.attn_processors.values())
    saved, kept = again.denoiser.state_dict(), family.denoiser.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    torch.testing.assert_close(predicted(again, x, written), plain, rtol=1e-4, atol=1e-5)


def test_older_processor_of_the_unet_is_masked_alike() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    new, old, x = Tiny(unet()), Tiny(unet()), latents(2)
    old.denoiser.set_attn_processor(AttnProcessor())
    rows = conditions(new, Brief("x", (CAT,)), Brief("y", (CAT, VASE)))
    for family in (new, old):
        Regional().prepare(family)
    torch.testing.assert_close(predicted(old, x, *rows), predicted(new, x, *rows), rtol=1e-4, atol=1e-5)


def test_objects_beyond_the_maximum_are_left_to_the_full_text() -> None:
    brief = Brief("x", (CAT, VASE, CAT))
    (row,) = conditions(Tiny(None), brief, boxes=Regional(max_objects=2))
    assert row["attention.rows"].shape == (2, 8)
    assert row["attention.columns"].shape == (2, 12)
    assert row["attention.regions"].tolist() == [1] * WORDS + [2] * WORDS + [3] * WORDS
    assert torch.equal(row["embeds"], torch.cat([text("x"), text("cat"), text("vase")]))


def test_denoiser_of_another_kind_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^Regional masks .*, got Linear: leave its boxes Native\(\)$"):
        Regional().prepare(Tiny(torch.nn.Linear(2, 2)))


def test_processor_it_does_not_know_is_refused_by_name() -> None:
    family = Tiny(unet())
    Regional().prepare(family)
    with pytest.raises(ConfigError, match="and the denoiser has RegionalCrossAttention"):
        Regional().prepare(family)


def test_family_without_embeds_is_refused() -> None:
    family = Tiny(None)
    family.encode = lambda briefs, size: [{"letters": torch.ones(3)} for _ in briefs]  # type: ignore[method-assign]
    with pytest.raises(ContractError, match='"embeds", and it encodes letters alone'):
        conditions(family, Brief("x"))


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"strength": float("nan")}, {"max_objects": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Regional(**wrong)
