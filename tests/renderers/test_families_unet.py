"""Families of UNets, Stable Diffusion 3 and Sana: what each feeds its model is what its diffusers pipeline feeds it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.renderers import tiny_pipelines
from torch import Tensor, nn

from reasonrl.errors import ConfigError
from reasonrl.plan import Box, PlannedObject
from reasonrl.renderers.adapting import alpha_bar, as_noise
from reasonrl.renderers.families.gligen import GLIGEN, MAX_BOXES
from reasonrl.renderers.families.sana import Sana
from reasonrl.renderers.families.stable_diffusion import StableDiffusion
from reasonrl.renderers.families.stable_diffusion_3 import StableDiffusion3
from reasonrl.renderers.families.stable_diffusion_xl import StableDiffusionXL
from reasonrl.renderers.family import Brief, Family, Size
from reasonrl.renderers.steps import DDIM, ODE, Kernel

OBJECTS = (
    PlannedObject("red circle", Box(0, 100, 450, 600)),
    PlannedObject("a shadow", None),
    PlannedObject("square", Box(500, 500, 1000, 875)),
)
TEXTS = ("a red circle", "two blue squares, left of it")
FLOAT_ERROR = {"rtol": 1e-5, "atol": 2e-5}


@frozen
class Case:
    """A family over a tiny pipeline."""

    adapter: Callable[[Any], Family]
    build: Callable[..., Any]
    settings: Mapping[str, Any] = field(factory=dict)
    size: Size = (16, 24)
    asked: Mapping[str, Any] = field(factory=dict)
    """What its pipeline is called with, besides what all of them are."""
    objects: tuple[PlannedObject, ...] = ()

    def open(self) -> Family:
        return self.adapter(self.build(**self.settings))


BOXES = {
    "gligen_phrases": ["red circle", "square"],
    "gligen_boxes": [[0.0, 0.1, 0.45, 0.6], [0.5, 0.5, 1.0, 0.875]],
    "gligen_scheduled_sampling_beta": 1.0,
}
CASES = {
    "StableDiffusion": Case(StableDiffusion, tiny_pipelines.stable_diffusion),
    "StableDiffusion-v": Case(StableDiffusion, tiny_pipelines.stable_diffusion, {"prediction_type": "v_prediction"}),
    "SDXL": Case(StableDiffusionXL, tiny_pipelines.stable_diffusion_xl),
    "SDXL-v-words": Case(
        StableDiffusionXL,
        tiny_pipelines.stable_diffusion_xl,
        {"prediction_type": "v_prediction", "force_zeros": False},
    ),
    "GLIGEN": Case(GLIGEN, tiny_pipelines.gligen, asked=BOXES, objects=OBJECTS),
    "SD3.5": Case(StableDiffusion3, tiny_pipelines.stable_diffusion_3),
    "SD3": Case(StableDiffusion3, tiny_pipelines.stable_diffusion_3, {"dual": False, "by_resolution": True}),
    "Sana": Case(Sana, tiny_pipelines.sana, size=(32, 64), asked={"use_resolution_binning": False}),
    "Sana-sigma": Case(
        Sana,
        tiny_pipelines.sana,
        {"learned_sigma": True},
        size=(32, 64),
        asked={"use_resolution_binning": False},
    ),
}
ONE_EACH = ("StableDiffusion", "SDXL", "GLIGEN", "SD3.5", "Sana")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=ONE_EACH)
def kind(request: pytest.FixtureRequest) -> Case:
    """One case of each adapter."""
    return CASES[request.param]


def noise(family: Family, size: Size, *, num_rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, *family.latent_shape(size), generator=torch.Generator().manual_seed(seed))


def encoded(family: Family, briefs: Sequence[Brief], size: Size) -> dict[str, Tensor]:
    with torch.no_grad():
        return family.collate(family.encode(briefs, size))


@torch.no_grad()
def drawn(family: Family, briefs: Sequence[Brief], latents: Tensor, size: Size, guidance: float) -> Tensor:
    """Returns the latents of a plain loop of our kernels over the family."""
    schedule = family.schedule(3, size)
    given, empty = encoded(family, briefs, size), encoded(family, [Brief("")] * len(briefs), size)
    kernel: Kernel = ODE() if family.flow else DDIM(eta=0.0)
    x = latents
    for i, now in enumerate(schedule.inputs):
        predicted = family.predict(x, now.expand(len(x)), given)
        if guidance > 1:
            base = family.predict(x, now.expand(len(x)), empty)
            predicted = base + guidance * (predicted - base)
        x, _ = kernel.moments(x, predicted, schedule.times[i], schedule.times[i + 1])
    return x


def asked(case: Case, family: Family, latents: Tensor, **settings: Any) -> Any:
    """Returns what the pipeline itself draws of them."""
    height, width = case.size
    given = {"num_inference_steps": 3, "height": height, "width": width, **case.asked, **settings}
    return family.pipe(list(TEXTS), latents=latents.clone(), **given).images


# ---- The pipeline's own pictures -------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_loop_over_the_family_ends_where_its_pipeline_does(case: Case, guidance: float) -> None:
    family = case.open()
    latents = noise(family, case.size, num_rows=1).repeat(2, 1, 1, 1)
    found = drawn(family, [Brief(text, case.objects) for text in TEXTS], latents, case.size, guidance)
    expected = asked(case, family, latents, guidance_scale=guidance, output_type="latent")
    torch.testing.assert_close(found, expected, **FLOAT_ERROR)
    assert (found[0] - found[1]).abs().max() > 0.01  # the texts differ, and nothing else


def test_decoded_pictures_are_the_pipelines(case: Case) -> None:
    family = case.open()
    latents = noise(family, case.size)
    drawn_latents = asked(case, family, latents, guidance_scale=4.0, output_type="latent")
    expected = asked(case, family, latents, guidance_scale=4.0, output_type="pil")
    with torch.no_grad():
        found = family.decode(drawn_latents)
    assert [picture.size for picture in found] == [case.size[::-1]] * 2
    assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in expected]


def test_latents_that_the_vae_standardises_are_decoded_as_the_pipeline_does() -> None:
    case = CASES["SDXL"]
    family = case.open()
    family.pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 1.0, 1.5, 2.0])
    latents = noise(family, case.size)
    final = asked(case, family, latents, output_type="latent")
    expected = asked(case, family, latents, output_type="pil")
    with torch.no_grad():
        assert [p.tobytes() for p in family.decode(final)] == [p.tobytes() for p in expected]


def test_a_float16_vae_that_overflows_decodes_in_float32() -> None:
    family = CASES["SDXL"].open()
    vae = family.pipe.vae.half()
    latents = noise(family, (16, 16))
    with torch.no_grad():
        found = family.decode(latents)
        assert vae.dtype == torch.float16
        expected = vae.float().decode(latents / vae.config.scaling_factor).sample
    pixels = family.pipe.image_processor.postprocess(expected, output_type="pil")
    assert [p.tobytes() for p in found] == [p.tobytes() for p in pixels]


def test_a_saved_pipeline_draws_the_same_picture_by_diffusers_alone(kind: Case, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    family = kind.open()
    latents = noise(family, kind.size)
    expected = asked(kind, family, latents, output_type="latent")
    family.save(tmp_path)
    again = kind.adapter(DiffusionPipeline.from_pretrained(tmp_path))
    again.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(asked(kind, again, latents, output_type="latent"), expected)


# ---- Conditions ------------------------------------------------------------------------------------


def test_an_empty_text_is_what_the_pipeline_takes_for_unconditional(case: Case) -> None:
    family = case.open()
    pipe, text = family.pipe, [TEXTS[0]]
    found = encoded(family, [Brief(""), Brief(TEXTS[0])], case.size)
    with torch.no_grad():
        if isinstance(family, StableDiffusion | GLIGEN):
            expected = {"embeds": pipe.encode_prompt(text, "cpu", 1, True)[1]}
        elif isinstance(family, StableDiffusionXL):
            embeds, pooled = pipe.encode_prompt(text)[1::2]
            expected = {"embeds": embeds, "pooled": pooled}
        elif isinstance(family, StableDiffusion3):
            embeds, pooled = pipe.encode_prompt(text, None, None)[1::2]
            expected = {"embeds": embeds, "pooled": pooled}
        else:
            embeds, mask = pipe.encode_prompt(text)[2:]
            expected = {"embeds": embeds, "mask": mask}
    for name, value in expected.items():
        torch.testing.assert_close(found[name][:1], value, **FLOAT_ERROR)
        assert not torch.equal(found[name][0], found[name][1])


def test_conditions_do_not_depend_on_the_other_briefs(kind: Case) -> None:
    family = kind.open()
    briefs = [Brief(TEXTS[1], kind.objects), Brief(""), Brief("x"), Brief(TEXTS[1])]
    with torch.no_grad():
        together = family.encode(briefs, kind.size)
        alone = [family.encode([brief], kind.size)[0] for brief in briefs]
    for row, other in zip(together, alone, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            torch.testing.assert_close(row[name], other[name], **FLOAT_ERROR)


def test_sdxl_sees_the_size_drawn_and_no_crop() -> None:
    found = encoded(CASES["SDXL"].open(), [Brief("x")], (16, 24))
    assert found["sizes"].tolist() == [[16, 24, 0, 0, 16, 24]]


def test_gligen_drops_what_has_no_box_and_what_is_behind_the_thirtieth() -> None:
    family = CASES["GLIGEN"].open()
    many = tuple(PlannedObject(f"thing {i}", Box(i, i, 500 + i, 500 + i)) for i in range(32))
    found = encoded(family, [Brief("x", OBJECTS), Brief("x", many)], (16, 16))
    assert found["mask"].sum(1).tolist() == [2, MAX_BOXES]
    torch.testing.assert_close(found["boxes"][0, :2], torch.tensor(BOXES["gligen_boxes"]))
    torch.testing.assert_close(found["boxes"][1, -1], torch.tensor([0.029, 0.029, 0.529, 0.529]))
    assert not found["boxes"][0, 2:].any()


def test_a_moved_box_changes_what_gligen_predicts() -> None:
    family = CASES["GLIGEN"].open()
    moved = (PlannedObject("red circle", Box(500, 100, 950, 600)), *OBJECTS[1:])
    conditions = encoded(family, [Brief("x", OBJECTS), Brief("x", moved), Brief("x", OBJECTS)], (16, 16))
    x = noise(family, (16, 16), num_rows=1).expand(3, -1, -1, -1)
    with torch.no_grad():
        here, there, again = family.predict(x, torch.full((3,), 500.0), conditions)
    torch.testing.assert_close(here, again, **FLOAT_ERROR)
    assert (here - there).abs().max() > 1e-3


# ---- Predictions -----------------------------------------------------------------------------------


def times_of(family: Family) -> Tensor:
    return torch.tensor([0.9, 0.5, 0.1]) if family.flow else torch.tensor([901.0, 500.5, 1.0])


def test_a_prediction_does_not_depend_on_the_other_rows(case: Case) -> None:
    family = case.open()
    briefs = [Brief(TEXTS[0], case.objects), Brief(""), Brief(TEXTS[1])]
    with torch.no_grad():
        rows = family.encode(briefs, case.size)
        x, inputs = noise(family, case.size, num_rows=3), times_of(family)
        together = family.predict(x, inputs, family.collate(rows))
        for i, row in enumerate(rows):
            alone = family.predict(x[i : i + 1], inputs[i : i + 1], family.collate([row]))
            torch.testing.assert_close(together[i : i + 1], alone, **FLOAT_ERROR)
    assert together.shape == x.shape


def test_a_prediction_does_not_depend_on_padding() -> None:
    family = CASES["Sana"].open()
    with torch.no_grad():
        rows = family.encode([Brief(TEXTS[0]), Brief("")], (32, 32))
        short = [{name: row[name][row["mask"].bool()] for name in row} for row in rows]
        assert len(short[1]["mask"]) < len(short[0]["mask"])
        x, inputs = noise(family, (32, 32)), times_of(family)[:2]
        expected = family.predict(x, inputs, family.collate(rows))
        torch.testing.assert_close(family.predict(x, inputs, family.collate(short)), expected, **FLOAT_ERROR)


@pytest.mark.parametrize("name", ["StableDiffusion", "SDXL", "GLIGEN", "SD3.5"])
def test_families_without_a_mask_of_texts_are_never_padded(name: str) -> None:
    case = CASES[name]
    briefs = [Brief("x"), Brief(" ".join(TEXTS), case.objects), Brief(TEXTS[0] * 20)]
    with torch.no_grad():
        rows = case.open().encode(briefs, case.size)
    shapes = [{key: value.shape for key, value in row.items()} for row in rows]
    assert shapes == [shapes[0]] * 3


def test_gradient_reaches_the_denoiser_and_nothing_else(case: Case) -> None:
    family = case.open()
    conditions = encoded(family, [Brief(text, case.objects) for text in TEXTS], case.size)
    x = noise(family, case.size)
    family.predict(x, times_of(family)[:2], conditions).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in family.denoiser.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    assert sum(bool(grad.any()) for grad in grads.values() if grad is not None) > 0.8 * len(grads)
    others = [m for m in family.pipe.components.values() if isinstance(m, nn.Module) and m is not family.denoiser]
    assert len(others) >= 2
    assert not [p for module in others for p in module.parameters() if p.grad is not None]


def test_a_bfloat16_model_takes_float32_latents(kind: Case) -> None:
    family = kind.open()
    briefs = [Brief(text, kind.objects) for text in TEXTS]
    x, inputs = noise(family, kind.size), times_of(family)[:2]
    with torch.no_grad():
        expected = family.predict(x, inputs, encoded(family, briefs, kind.size))
        family.pipe.to(torch.bfloat16)
        found = family.predict(x, inputs, encoded(family, briefs, kind.size)).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


class Weighed:
    """An attention processor whose rows are weighed by `regions`."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, regions: Tensor | None = None, **also: Any) -> Any:
        found = self.usual(attn, hidden_states, *args, **also)
        if regions is None:
            return found
        weights = regions[:, None, None]
        return tuple(weights * each for each in found) if isinstance(found, tuple) else weights * found


@pytest.mark.parametrize("name", ["StableDiffusion", "SDXL", "GLIGEN", "SD3.5"])
def test_conditions_named_attention_reach_the_processors_by_row(name: str) -> None:
    case = CASES[name]
    family = case.open()
    conditions = encoded(family, [Brief(text, case.objects) for text in TEXTS], case.size)
    x, inputs = noise(family, case.size), times_of(family)[:2]
    with torch.no_grad():
        plain = family.predict(x, inputs, conditions)
        denoiser: Any = family.denoiser
        denoiser.set_attn_processor({key: Weighed(each) for key, each in denoiser.attn_processors.items()})
        torch.testing.assert_close(family.predict(x, inputs, conditions), plain)
        found = family.predict(x, inputs, conditions | {"attention.regions": torch.tensor([1.0, 0.5])})
    torch.testing.assert_close(found[0], plain[0], **FLOAT_ERROR)
    assert (found[1] - plain[1]).abs().max() > 1e-3


def test_channels_behind_the_latents_go_to_the_model_and_not_into_its_noise() -> None:
    for name in ("StableDiffusion-v", "SDXL-v-words", "SD3.5"):
        case = CASES[name]
        family = case.open()
        conditions = encoded(family, [Brief(text) for text in TEXTS], case.size)
        x, inputs = noise(family, case.size), times_of(family)[:2]
        denoiser: Any = family.denoiser
        with torch.no_grad():
            expected = family.predict(x, inputs, conditions)
            holder, entry = (denoiser.pos_embed, "proj") if family.flow else (denoiser, "conv_in")
            narrow = getattr(holder, entry)
            wide = nn.Conv2d(6, narrow.out_channels, narrow.kernel_size, narrow.stride, narrow.padding)
            wide.weight.zero_()[:, :4] = narrow.weight
            wide.bias.copy_(narrow.bias)
            setattr(holder, entry, wide)
            found = family.predict(torch.cat([x, noise(family, case.size, seed=1)[:, :2]], 1), inputs, conditions)
        torch.testing.assert_close(found, expected, **FLOAT_ERROR)


# ---- Variance-preserving models --------------------------------------------------------------------


def test_the_schedule_is_stable_diffusions() -> None:
    schedule = CASES["StableDiffusion"].open().schedule(4, (16, 16))
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    table = np.cumprod(1 - betas)
    assert schedule.inputs.tolist() == [751.0, 501.0, 251.0, 1.0]
    np.testing.assert_allclose(schedule.times.numpy(), table[[751, 501, 251, 1, 0]], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(timestep=st.floats(0, 999, width=32), kind=st.sampled_from(["epsilon", "v_prediction"]))
def test_the_noise_in_a_mixture_is_found_at_any_timestep(timestep: float, kind: str) -> None:
    scheduler = tiny_pipelines.ddim(kind)
    generator = torch.Generator().manual_seed(0)
    data, eps, behind = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(3))
    at = torch.tensor([timestep])
    share = alpha_bar(scheduler, at).item()
    x = math.sqrt(share) * data + math.sqrt(1 - share) * eps
    predicted = eps if kind == "epsilon" else math.sqrt(share) * eps - math.sqrt(1 - share) * data
    found = as_noise(scheduler, predicted, torch.cat([x, behind], 1), at)
    torch.testing.assert_close(found, eps, **FLOAT_ERROR)


def test_alpha_bar_is_linear_between_whole_timesteps() -> None:
    scheduler = tiny_pipelines.ddim()
    table = scheduler.alphas_cumprod
    found = alpha_bar(scheduler, torch.tensor([0.0, 10.25, 999.0]))
    torch.testing.assert_close(found, torch.stack([table[0], 0.75 * table[10] + 0.25 * table[11], table[999]]))


@pytest.mark.parametrize("name", ["StableDiffusion", "SDXL", "GLIGEN"])
def test_a_model_that_predicts_the_data_is_refused(name: str) -> None:
    pipe = CASES[name].build()
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="prediction_type 'sample', expected 'epsilon' or 'v_prediction'"):
        CASES[name].adapter(pipe)


def test_a_unet_with_guidance_distilled_into_it_is_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet.register_to_config(time_cond_proj_dim=4)
    with pytest.raises(ConfigError, match="distilled"):
        StableDiffusion(pipe)


# ---- Sizes -----------------------------------------------------------------------------------------


def test_the_default_size_is_the_models(kind: Case) -> None:
    family = kind.open()
    side = 32 if isinstance(family, Sana) else 16
    assert family.size == (side, side)
    assert family.latent_shape(family.size) == (4, side // 2, side // 2)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("StableDiffusion", (16, 20)),
        ("SDXL", (12, 16)),
        ("GLIGEN", (16, 20)),
        ("SD3.5", (16, 18)),
        ("SD3.5", (52, 16)),
        ("Sana", (48, 32)),
    ],
)
def test_a_size_that_the_pipeline_refuses_is_refused(name: str, size: Size) -> None:
    case = CASES[name]
    family = case.open()
    with pytest.raises(ConfigError, match=f"cannot draw a size of {size[0]} x {size[1]}: give a height"):
        family.latent_shape(size)
    with pytest.raises(ValueError, match=r"(?i)height"):
        family.pipe("x", height=size[0], width=size[1], num_inference_steps=1, **case.asked)


def test_a_picture_without_pixels_is_refused(kind: Case) -> None:
    family = kind.open()
    for size in ((0, 32), (32, -32)):
        with pytest.raises(ConfigError, match="cannot draw"):
            family.latent_shape(size)
