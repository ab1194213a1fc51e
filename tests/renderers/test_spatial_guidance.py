import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.plan import MAX_OBJECTS, Box, PlannedObject
from reasonrl.renderers.family import Brief, Conditions, Family, Schedule, Size
from reasonrl.renderers.spatial_guidance import SpatialGuidance, colour, colour_masks

SIZE = (32, 48)
SCALES = st.floats(-20, 20)
moderate = settings(max_examples=60, deadline=None)
CAT, VASE = PlannedObject("cat", Box(0, 0, 500, 500)), PlannedObject("vase", Box(500, 250, 1000, 1000))


class Tiny(Family):
    """A tiny denoiser and VAE of diffusers; a text is random numbers of its own."""

    def __init__(self, denoiser: Any, **vae: Any) -> None:
        from diffusers import AutoencoderKL
        from diffusers.image_processor import VaeImageProcessor

        super().__init__(SimpleNamespace(image_processor=VaeImageProcessor(vae_scale_factor=2)))
        torch.manual_seed(1)
        self.pipe.vae = AutoencoderKL(
            block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.5,
            **vae,
        ).eval()
        self.pipe.denoiser = denoiser

    @property
    def denoiser(self) -> Any:
        return self.pipe.denoiser

    @property
    def size(self) -> Size:
        return SIZE

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.pipe.vae.config.latent_channels, size[0] // 2, size[1] // 2

    def encode(self, briefs: list[Brief], size: Size) -> list[dict[str, Tensor]]:
        def words(text: str) -> dict[str, Tensor]:
            own = torch.Generator().manual_seed(sum(text.encode()))
            return {"embeds": torch.randn(5, 8, generator=own), "pooled": torch.randn(8, generator=own)}

        return [words(brief.text) for brief in briefs]

    def schedule(self, num_steps: int, size: Size) -> Schedule:
        raise NotImplementedError

    def predict(self, x: Tensor, inputs: Tensor, conditions: Conditions) -> Tensor:
        extra = {"pooled_projections": conditions["pooled"]} if hasattr(self.denoiser, "pos_embed") else {}
        return self.denoiser(
            x, timestep=inputs, encoder_hidden_states=conditions["embeds"], return_dict=False, **extra
        )[0]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        raise NotImplementedError


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        **more,
    ).eval()


def transformer(**more: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**{**settings, **more}).eval()


BOTH = pytest.mark.parametrize("build", [unet, transformer])


def latents(rows: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(rows, channels, SIZE[0] // 2, SIZE[1] // 2, generator=torch.Generator().manual_seed(2))


def predicted(family: Family, x: Tensor, row: Conditions, *, channels: bool = True) -> Tensor:
    one = {name: value[None] for name, value in row.items()}
    extra = one.pop("channels", None)
    wide = torch.cat([x, extra], 1) if channels and extra is not None else x
    return family.predict(wide, torch.tensor([7.0]), one)


def guided(family: Family, boxes: SpatialGuidance, x: Tensor, found: dict[str, list[Conditions]]) -> Tensor:
    weights = {name: weight for name, weight in boxes.branches(7.5).items() if weight}
    return sum(weight * predicted(family, x, found[name][0]) for name, weight in weights.items())


# ---- Weights -------------------------------------------------------------------------------------------


@moderate
@given(SCALES, SCALES, SCALES)
def test_weights_add_to_one_for_any_scales(text: float, spatial: float, reference: float) -> None:
    weights = SpatialGuidance(text, spatial, reference).branches(4.5)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert next(iter(weights)) == "full"


@moderate
@given(SCALES, SCALES, SCALES, st.integers(0, 1000))
def test_weighted_sum_is_the_papers_formula_in_float64(a_t: float, a_s: float, a_r: float, seed: int) -> None:
    own = torch.Generator().manual_seed(seed)
    nothing, of_picture, of_text, of_all = torch.randn(4, 3, dtype=torch.float64, generator=own)
    paper = nothing + a_t * (of_text - of_picture) + a_s * (of_all - of_text) + a_r * (of_picture - nothing)
    weights = SpatialGuidance(a_t, a_s, a_r).branches(7.5)
    mine = {"full": of_all, "text": of_text, "reference": of_picture, "blank": nothing}
    found = sum(weights[name] * each for name, each in mine.items())
    torch.testing.assert_close(found, paper, rtol=1e-12, atol=1e-12)


def test_golden_weights_of_the_papers_scales() -> None:
    drawn = SpatialGuidance(text=7.5, spatial=4.0, reference=1.0).branches(7.5)
    assert drawn == {"full": 4.0, "text": 3.5, "reference": -6.5, "blank": 0.0}
    edited = SpatialGuidance(text=4.0, spatial=3.0, reference=1.5).branches(7.5)
    assert edited == {"full": 3.0, "text": 1.0, "reference": -2.5, "blank": -0.5}


def test_guidance_telescopes_to_the_full_branch_at_ones() -> None:
    weights = SpatialGuidance(text=1.0, spatial=1.0, reference=1.0).branches(7.5)
    assert weights == {"full": 1.0, "text": 0.0, "reference": 0.0, "blank": 0.0}
    assert SpatialGuidance().branches(1.0) == {"full": 1.0}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_scale_that_is_not_finite_is_refused_by_name(wrong: float) -> None:
    with pytest.raises(ConfigError, match=f"spatial must be a finite number, got {wrong}"):
        SpatialGuidance(spatial=wrong)


# ---- Masks ---------------------------------------------------------------------------------------------


def test_colours_are_the_same_everywhere_bright_and_distinct() -> None:
    assert [colour(place) for place in range(4)] == [(255, 0, 0), (0, 74, 255), (149, 255, 0), (255, 0, 223)]
    palette = {colour(place) for place in range(MAX_OBJECTS)}
    assert len(palette) == MAX_OBJECTS
    assert all(max(rgb) == 255 for rgb in palette)


def test_masks_come_in_the_plans_order_each_box_in_its_places_colour() -> None:
    first, second = (np.asarray(mask) for mask in colour_masks([CAT, PlannedObject("sun", None), VASE], SIZE))
    assert first.shape == (32, 48, 3)
    expected = np.zeros((32, 48, 3), np.uint8)
    expected[:16, :24] = colour(0)
    np.testing.assert_array_equal(first, expected)
    expected = np.zeros((32, 48, 3), np.uint8)
    expected[8:, 24:] = colour(2)
    np.testing.assert_array_equal(second, expected)


@moderate
@given(*[st.integers(-300, 1300)] * 4)
def test_boxes_are_clipped_to_the_canvas_and_never_vanish(x0: int, y0: int, x1: int, y1: int) -> None:
    masks = colour_masks([PlannedObject("cat", Box(x0, y0, x1, y1))], (16, 16))
    left, top, right, bottom = (min(max(side, 0), 1000) for side in (x0, y0, x1, y1))
    clipped = colour_masks([PlannedObject("cat", Box(left, top, right, bottom))], (16, 16))
    assert [m.tobytes() for m in masks] == [m.tobytes() for m in clipped]
    for mask in masks:
        on = np.asarray(mask).any(-1)
        assert on.any()
        assert abs(on.mean() - (right - left) * (bottom - top) / 1e6) < 1 / 8  # a pixel's rounding a side


# ---- Conditions ----------------------------------------------------------------------------------------


def test_channels_are_the_mean_of_the_masks_latents_and_then_the_black_picture() -> None:
    family = Tiny(unet())
    found = SpatialGuidance().conditions(family, [Brief("x", (CAT, VASE))], Brief(""), SIZE, 7.5)

    def by_hand(picture: Image.Image) -> Tensor:
        pixels = torch.tensor(np.asarray(picture), dtype=torch.float32) / 127.5 - 1
        mode = family.pipe.vae.encode(rearrange(pixels, "h w rgb -> 1 rgb h w")).latent_dist.mode()
        return 0.5 * mode[0].detach()

    masks = torch.stack([by_hand(mask) for mask in colour_masks([CAT, VASE], SIZE)])
    black = by_hand(Image.new("RGB", (48, 32)))
    assert black.abs().max() > 0
    spatial, reference = found["full"][0]["channels"].split(4)
    torch.testing.assert_close(spatial, masks.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(reference, black, rtol=0, atol=1e-5)
    assert not found["text"][0]["channels"][:4].any()
    assert torch.equal(found["text"][0]["channels"][4:], reference)
    assert torch.equal(found["reference"][0]["channels"], found["text"][0]["channels"])
    assert not found["blank"][0]["channels"].any()


def test_texts_are_the_briefs_in_the_first_two_branches_and_the_negative_in_the_last_two() -> None:
    family = Tiny(unet())
    found = SpatialGuidance().conditions(family, [Brief("x", (CAT,))], Brief("ugly"), SIZE, 7.5)
    written, ugly = (row["embeds"] for row in family.encode([Brief("x"), Brief("ugly")], SIZE))
    assert {name: torch.equal(rows[0]["embeds"], written) for name, rows in found.items()} == {
        "full": True,
        "text": True,
        "reference": False,
        "blank": False,
    }
    assert torch.equal(found["reference"][0]["embeds"], ugly)
    assert torch.equal(found["blank"][0]["embeds"], ugly)


def test_scaling_is_the_pipelines_with_a_shift_and_with_statistics_of_each_channel() -> None:
    brief = [Brief("x", (CAT,))]
    plain = SpatialGuidance().conditions(Tiny(unet()), brief, Brief(""), SIZE, 1.0)["full"][0]["channels"]
    shifted = SpatialGuidance().conditions(Tiny(unet(), shift_factor=0.3), brief, Brief(""), SIZE, 1.0)
    torch.testing.assert_close(shifted["full"][0]["channels"], plain - 0.3 * 0.5, rtol=0, atol=1e-6)
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    scaled = SpatialGuidance().conditions(Tiny(unet(), **statistics), brief, Brief(""), SIZE, 1.0)
    mean, std = (torch.tensor(each * 2)[:, None, None] for each in statistics.values())
    torch.testing.assert_close(scaled["full"][0]["channels"], (plain - 0.5 * mean) / std, rtol=0, atol=1e-6)


def test_vae_that_overflows_in_float16_encodes_in_float32_and_stays_as_it_was() -> None:
    brief = [Brief("x", (CAT,))]
    half = Tiny(unet(), force_upcast=True)
    half.pipe.vae.to(dtype=torch.float16)
    rounded = Tiny(unet())
    rounded.pipe.vae.to(dtype=torch.float16).to(dtype=torch.float32)
    found, expected = (
        SpatialGuidance().conditions(family, brief, Brief(""), SIZE, 1.0)["full"][0] for family in (half, rounded)
    )
    assert torch.equal(found["channels"], expected["channels"])
    assert half.pipe.vae.dtype == torch.float16


def test_plan_without_boxes_is_drawn_from_the_text_alone() -> None:
    brief = Brief("x", (PlannedObject("cat", None), PlannedObject("sun", Box(900, 900, 905, 905))))
    found = SpatialGuidance().conditions(Tiny(unet()), [brief], Brief(""), SIZE, 7.5)
    assert all(torch.equal(found["full"][0][name], found["text"][0][name]) for name in found["full"][0])


def test_picture_to_edit_is_the_reference_at_the_size_drawn() -> None:
    picture = Image.new("RGB", (96, 64), (200, 30, 90))
    family = Tiny(unet())
    briefs = [Brief("x", (CAT,), picture), Brief("y", (), picture), Brief("z")]
    found = SpatialGuidance().conditions(family, briefs, Brief(""), SIZE, 7.5)
    small = Brief("x", (CAT,), Image.new("RGB", (48, 32), (200, 30, 90)))
    again = SpatialGuidance().conditions(family, [small], Brief(""), SIZE, 7.5)
    torch.testing.assert_close(found["full"][0]["channels"], again["full"][0]["channels"], rtol=0, atol=1e-6)
    assert not torch.equal(found["reference"][0]["channels"], found["reference"][2]["channels"])
    assert found["reference"][0] is found["reference"][1]


def test_branches_that_are_the_same_for_all_briefs_hold_the_same_tensors() -> None:
    briefs = [Brief("x", (CAT,)), Brief("y", (VASE,))]
    found = SpatialGuidance().conditions(Tiny(unet()), briefs, Brief(""), SIZE, 7.5)
    for branch in ("reference", "blank"):
        first, second = found[branch]
        assert all(first[name] is second[name] for name in first)
    assert found["full"][0]["channels"] is not found["full"][1]["channels"]


def test_a_group_of_one_plan_has_the_masks_that_each_has_alone() -> None:
    family = Tiny(unet())
    both = SpatialGuidance().conditions(family, [Brief("x", (CAT, VASE)), Brief("y", (VASE,))], Brief(""), SIZE, 1.0)
    alone = SpatialGuidance().conditions(family, [Brief("y", (VASE,))], Brief(""), SIZE, 1.0)
    assert list(both) == ["full"]
    assert torch.equal(both["full"][1]["channels"][4:], alone["full"][0]["channels"][4:])
    assert not torch.equal(both["full"][1]["channels"], both["full"][0]["channels"])


def test_branches_of_no_weight_are_not_encoded() -> None:
    boxes = SpatialGuidance(text=7.5, spatial=4.0, reference=1.0)
    assert list(boxes.conditions(Tiny(unet()), [Brief("x")], Brief(""), SIZE, 7.5)) == ["full", "text", "reference"]


# ---- The widened denoiser ------------------------------------------------------------------------------


@BOTH
def test_widened_denoiser_predicts_bit_identically_whatever_the_boxes(build: Any) -> None:
    family, x = Tiny(build()), (8 * latents(1)).round() / 8
    boxes = SpatialGuidance()
    with torch.no_grad():  # on a grid, sums are exact in whatever order a library takes them
        for parameter in boxes.added(family.denoiser)[0].parameters():
            parameter.copy_((64 * parameter).round() / 64)
    found = boxes.conditions(family, [Brief("x", (CAT, VASE))], Brief("ugly"), SIZE, 7.5)
    before = {name: predicted(family, x, rows[0], channels=False) for name, rows in found.items()}
    boxes.prepare(family)
    after = {name: predicted(family, x, rows[0]) for name, rows in found.items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    text, nothing = before["full"], before["blank"]
    plain = nothing + 7.5 * (text - nothing)
    torch.testing.assert_close(guided(family, boxes, x, found), plain, rtol=1e-4, atol=1e-5)


@BOTH
def test_trained_first_layer_sees_the_boxes(build: Any) -> None:
    family, boxes, x = Tiny(build()), SpatialGuidance(), latents(1)
    boxes.prepare(family)
    (layer,) = boxes.added(family.denoiser)
    family.denoiser.requires_grad_(False)
    layer.requires_grad_(True)
    moved = PlannedObject("cat", Box(500, 500, 1000, 1000))
    found = boxes.conditions(family, [Brief("x", (CAT,)), Brief("x", (moved,))], Brief(""), SIZE, 1.0)["full"]
    before = predicted(family, x, found[0])
    assert torch.equal(before, predicted(family, x, found[1]))
    before.square().mean().backward()
    new = layer.weight.grad[:, 4:]
    assert new.shape[1] == 8
    assert new[:, :4].abs().max() > 0
    assert new[:, 4:].abs().max() > 0
    torch.optim.SGD([layer.weight], lr=1.0).step()
    here, there = (predicted(family, x, row) for row in found)
    assert (here - there).abs().max() > 1e-6


@BOTH
def test_widened_denoiser_goes_through_diffusers_and_comes_back(build: Any, tmp_path: Path) -> None:
    family, boxes, x = Tiny(build()), SpatialGuidance(), latents(1)
    boxes.prepare(family)
    with torch.no_grad():
        boxes.added(family.denoiser)[0].weight[:, 4:].normal_()
    (row,) = boxes.conditions(family, [Brief("x", (CAT,))], Brief(""), SIZE, 1.0)["full"]
    family.denoiser.save_pretrained(tmp_path)
    again = Tiny(type(family.denoiser).from_pretrained(tmp_path).eval())
    assert again.denoiser.config.in_channels == 12
    assert again.denoiser.config.out_channels == 4
    boxes.prepare(again)  # as wide already: changes nothing
    saved, kept = again.denoiser.state_dict(), family.denoiser.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    torch.testing.assert_close(predicted(again, x, row), predicted(family, x, row), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_trained", [True, False])
def test_widened_weights_learn_where_the_old_ones_did(is_trained: bool) -> None:
    family = Tiny(unet().requires_grad_(is_trained))
    SpatialGuidance().prepare(family)
    assert family.denoiser.conv_in.weight.requires_grad == is_trained


def test_out_channels_that_follow_the_input_stay_as_they_are() -> None:
    family = Tiny(transformer(out_channels=None))
    SpatialGuidance().prepare(family)
    assert (family.denoiser.config.in_channels, family.denoiser.config.out_channels) == (12, 4)


def test_adapters_leave_the_widened_layer_to_learn_beside_them() -> None:
    from peft import LoraConfig

    family, boxes = Tiny(unet()), SpatialGuidance()
    boxes.prepare(family)
    family.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for module in boxes.added(family.denoiser):
        module.requires_grad_(True)
    (row,) = boxes.conditions(family, [Brief("x", (CAT,))], Brief(""), SIZE, 1.0)["full"]
    predicted(family, latents(1), row).square().mean().backward()
    learned = {name for name, p in family.denoiser.named_parameters() if p.grad is not None and p.grad.any()}
    assert "conv_in.weight" in learned
    assert any("lora_B" in name for name in learned)
    assert all(name.startswith("conv_in") or "lora" in name for name in learned)


def test_denoiser_of_another_kind_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^SpatialGuidance widens .*, got Linear: leave its boxes Native\(\)$"):
        SpatialGuidance().prepare(Tiny(torch.nn.Linear(2, 2)))


def test_denoiser_with_other_further_channels_is_refused_in_one_line() -> None:
    family = Tiny(unet())
    family.pipe.vae.register_to_config(latent_channels=3)
    with pytest.raises(ConfigError, match="conv_in takes 4 channels, and SpatialGuidance widens 3 to 9"):
        SpatialGuidance().prepare(family)
