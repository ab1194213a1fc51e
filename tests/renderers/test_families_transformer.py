"""Adapters of FLUX.1, FLUX.2 klein, Qwen-Image and Z-Image against the pipelines themselves, at random weights."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from tests.renderers import tiny_transformer_pipelines as pipelines
from torch import Tensor

from reasonrl.errors import ConfigError
from reasonrl.renderers.families.flux import Flux
from reasonrl.renderers.families.flux_2 import Flux2Klein
from reasonrl.renderers.families.flux_kontext import FluxKontext
from reasonrl.renderers.families.qwen_image import QwenImage
from reasonrl.renderers.families.qwen_image_edit import QwenImageEdit
from reasonrl.renderers.families.z_image import ZImage
from reasonrl.renderers.family import Brief, Family
from reasonrl.renderers.steps import ODE, step

SIZE = (16, 24)
TEXTS = ("red", "a green cross to the right of two small yellow diamonds")
SCALE = 3.0
STEPS = 3


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def plainly(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    return without + scale * (with_text - without)


def rescaled(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Qwen-Image: each token keeps the length that it has with its text."""
    tokens, old = (packed(each) for each in (plainly(with_text, without, scale), with_text))
    tokens = tokens * (old.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
    height, width = with_text.shape[-2:]
    spread = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
    return spread.permute(0, 3, 1, 4, 2, 5).reshape(with_text.shape)


def packed(latents: Tensor) -> Tensor:
    return pipelines.FluxPipeline._pack_latents(latents, *latents.shape)


def finished_flux_2(pipe: Any, latents: Tensor) -> Tensor:
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return pipe._unpatchify_latents(latents * std[:, None, None] + pipe.vae.bn.running_mean[:, None, None])


@frozen
class Case:
    """How a pipeline is told what a family is told, and how their latents compare."""

    family: Callable[[Any], Family]
    build: Callable[[], DiffusionPipeline]
    unguided: dict[str, Any]
    guided: dict[str, Any]
    combine: Callable[[Tensor, Tensor, float], Tensor] = plainly
    edits: bool = False
    given: Callable[[Tensor], Tensor] = packed
    """The pipeline's latents= of ours."""
    finished: Callable[[Any, Tensor], Tensor] = lambda pipe, latents: packed(latents)
    """What it returns as output_type="latent" of ours."""

    def made(self) -> Family:
        return self.family(self.build())

    def briefs(self, texts: Sequence[str] = TEXTS, seed: int = 0) -> list[Brief]:
        return [Brief(text, image=picture(seed + i) if self.edits else None) for i, text in enumerate(texts)]


PLAIN: dict[str, Any] = {}
TRUE_CFG = {"true_cfg_scale": SCALE, "negative_prompt": ""}
ONE = {"true_cfg_scale": 1.0}
SQUARE = {"max_area": SIZE[0] * SIZE[1], "_auto_resize": False}
CASES = {
    "flux": Case(Flux, pipelines.flux, PLAIN, TRUE_CFG),
    "flux_kontext": Case(FluxKontext, pipelines.flux_kontext, SQUARE, SQUARE | TRUE_CFG, edits=True),
    "flux_2_klein": Case(
        Flux2Klein,
        pipelines.flux_2_klein,
        {"guidance_scale": 1.0},
        {"guidance_scale": SCALE},
        given=lambda latents: latents,
        finished=finished_flux_2,
    ),
    "qwen_image": Case(QwenImage, pipelines.qwen_image, ONE, TRUE_CFG, rescaled),
    "qwen_image_edit": Case(QwenImageEdit, pipelines.qwen_image_edit, ONE, TRUE_CFG, rescaled, edits=True),
    "z_image": Case(
        ZImage,
        pipelines.z_image,
        {"guidance_scale": 0.0},
        {"guidance_scale": SCALE - 1},  # it adds scale (with - without) to what has the text already
        given=lambda latents: latents,
        finished=lambda pipe, latents: latents,
    ),
}
EDITING = [name for name, case in CASES.items() if case.edits]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def pictures_are_edited_at_the_size_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit's pipeline resizes them to about a million pixels, whatever size it draws."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*SIZE[::-1], None))


def noise(family: Family, num_rows: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(num_rows, *family.latent_shape(size), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def conditions(family: Family, briefs: Sequence[Brief], size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    return family.collate(family.encode(briefs, size))


@torch.no_grad()
def drawn(
    family: Family,
    briefs: Sequence[Brief],
    x: Tensor,
    combine: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    size: tuple[int, int] = SIZE,
) -> Tensor:
    """Returns the latents at the end of a plain loop of Euler's steps."""
    told, untold = (conditions(family, each, size) for each in (briefs, [evolve(brief, text="") for brief in briefs]))
    schedule = family.schedule(STEPS, size)
    for s, now, then in zip(schedule.inputs, schedule.times[:-1], schedule.times[1:], strict=True):
        v = family.predict(x, s.expand(len(x)), told)
        if combine is not None:
            v = combine(v, family.predict(x, s.expand(len(x)), untold), SCALE)
        x = step(ODE(), x, v, now, then).next
    return x


def asked(brief: Brief, latents: Tensor, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Returns a pipeline's arguments for one picture."""
    image = {} if brief.image is None else {"image": brief.image}
    return {
        "prompt": brief.text,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": STEPS,
        "latents": latents,
        **image,
    }


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def check_same_drawing(case: Case, family: Family, briefs: list[Brief], guided: bool, size: tuple[int, int]) -> None:
    start = noise(family, len(briefs), size)
    ours = drawn(family, briefs, start, case.combine if guided else None, size)
    pictures = family.decode(ours)
    for i, brief in enumerate(briefs):
        arguments = asked(brief, case.given(start[i : i + 1]), size) | (case.guided if guided else case.unguided)
        theirs = family.pipe(**arguments, output_type="latent").images
        torch.testing.assert_close(case.finished(family.pipe, ours[i : i + 1]), theirs, rtol=1e-4, atol=1e-4)
    shown = levels(family.pipe(**arguments).images[0])
    assert shown.std() > 1
    assert abs(levels(pictures[-1]) - shown).max() <= 1  # levels of 255: a rounding may fall to the other side


# ---- Parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_a_plain_loop_over_a_padded_batch_draws_what_the_pipeline_draws_of_each_row(case: Case, guided: bool) -> None:
    check_same_drawing(case, case.made(), case.briefs(), guided, SIZE)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_2_klein_edits_as_its_pipeline_does(guided: bool) -> None:
    size = (64, 68)  # its pipeline refuses pictures of less than 64 pixels
    briefs = [Brief(text, image=picture(i, size)) for i, text in enumerate(TEXTS)]
    check_same_drawing(CASES["flux_2_klein"], CASES["flux_2_klein"].made(), briefs, guided, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, "flux_2_klein edits"])
def test_the_transformer_is_fed_to_the_bit_what_its_pipeline_feeds_it(name: str, dtype: torch.dtype) -> None:
    case = CASES[name.split()[0]]
    size = (64, 68) if "edits" in name else SIZE
    family = case.made()
    family.pipe.to(dtype)
    brief = evolve(case.briefs()[1], image=picture(size=size) if case.edits or "edits" in name else None)
    start = noise(family, 1, size).to(dtype)
    fed = heard(family)
    theirs_start = case.given(start).float() if case.family is ZImage else case.given(start)
    family.pipe(**asked(brief, theirs_start, size), **case.unguided, output_type="latent")
    drawn(family, [brief], start, size=size)
    theirs, ours = fed[:STEPS], fed[STEPS:]
    assert len(theirs) == len(ours) == STEPS
    assert same(theirs[0], ours[0]), "at the first step everything is"
    for one, other in zip(theirs, ours, strict=True):
        time = "t" if case.family is ZImage else "timestep"
        assert same({time: one[time]}, {time: other[time]})


def heard(family: Family) -> list[dict[str, Any]]:
    """Returns a list of the arguments by name of each call of the denoiser from now on."""
    fed: list[dict[str, Any]] = []
    accepts = inspect.signature(family.denoiser.forward)

    def hear(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fed.append(accepts.bind(*args, **kwargs).arguments)

    family.denoiser.register_forward_pre_hook(hear, with_kwargs=True)
    return fed


def same(theirs: Any, ours: Any) -> bool:
    """Whether arguments are equal, but for those that say nothing and a batch axis that positions may have."""
    if isinstance(theirs, dict):
        told = (theirs.keys() | ours.keys()) - {"joint_attention_kwargs", "attention_kwargs"}
        return all(same(theirs.get(name), ours.get(name)) for name in told)
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        theirs = theirs[0] if theirs.ndim > ours.ndim else theirs
        return theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    return bool(theirs == ours)


def test_distilled_guidance_is_what_the_pipeline_calls_guidance_scale() -> None:
    case = evolve(
        CASES["flux"], family=lambda pipe: Flux(pipe, embedded_guidance=1.0), unguided={"guidance_scale": 1.0}
    )
    check_same_drawing(case, case.made(), case.briefs(), False, SIZE)
    told, untold = case.made(), CASES["flux"].made()
    x, s, texts = noise(told), torch.tensor([0.7, 0.3]), conditions(told, case.briefs())
    assert (told.predict(x, s, texts) - untold.predict(x, s, texts)).abs().max() > 1e-3


def test_a_transformer_without_distilled_guidance_is_fed_none() -> None:
    case = evolve(CASES["flux"], build=lambda: pipelines.flux(guidance_embeds=False))
    check_same_drawing(case, case.made(), case.briefs(), False, SIZE)


def test_the_default_size_is_the_pipelines(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (1024, 1024, None))
    family = case.made()
    accepts = inspect.signature(family.pipe.prepare_latents)

    def stop(*args: Any, **kwargs: Any) -> None:
        found = accepts.bind(*args, **kwargs).arguments
        raise InterruptedError(found["height"], found["width"])

    monkeypatch.setattr(family.pipe, "prepare_latents", stop)
    square = {"image": picture(size=(16, 16))} if case.edits else {}
    with pytest.raises(InterruptedError) as told:
        family.pipe(prompt="red", num_inference_steps=1, **square)
    assert told.value.args == family.size


def test_saved_weights_predict_the_same_when_diffusers_alone_loads_them(case: Case, tmp_path: Path) -> None:
    family = case.made()
    family.save(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(family.pipe)
    x, s = noise(family), torch.tensor([0.7, 0.3])
    with torch.no_grad():
        ours, theirs = (each.predict(x, s, conditions(each, case.briefs())) for each in (family, case.family(loaded)))
    assert torch.equal(ours, theirs)


# ---- Rows, gradients, texts ------------------------------------------------------------------------------


def test_a_rows_prediction_does_not_depend_on_other_rows_or_padding(case: Case) -> None:
    family = case.made()
    briefs = case.briefs((*TEXTS, ""))
    x, s = noise(family, len(briefs)), torch.tensor([0.9, 0.1, 1.0])
    with torch.no_grad():
        together = family.predict(x, s, conditions(family, briefs))
        for i, brief in enumerate(briefs):
            alone = family.predict(x[i : i + 1], s[i : i + 1], conditions(family, [brief]))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    assert together.shape == x.shape


def test_text_and_time_move_the_prediction(case: Case) -> None:
    family = case.made()
    x = noise(family, 1).expand(3, -1, -1, -1)
    briefs = case.briefs((TEXTS[0], TEXTS[1], TEXTS[0]))
    briefs = [evolve(brief, image=briefs[0].image) for brief in briefs]
    with torch.no_grad():
        found = family.predict(x, torch.tensor([0.5, 0.5, 0.8]), conditions(family, briefs))
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert (found[0] - found[2]).abs().max() > 1e-4


def test_the_gradient_reaches_the_denoiser_and_not_what_encodes(case: Case) -> None:
    family = case.made()
    for part in ("text_encoder", "text_encoder_2", "vae"):
        module = family.pipe.components.get(part)
        if module is not None:
            module.requires_grad_(True)
    told = conditions(family, case.briefs())
    family.predict(noise(family), torch.tensor([0.7, 0.3]), told).square().mean().backward()
    still = {
        name for name, weight in family.denoiser.named_parameters() if weight.grad is None or not weight.grad.any()
    }
    assert all("add" in name or "txt_mlp" in name for name in still)  # the last block's text, which nothing reads
    parts = family.pipe.components.values()
    others = [part for part in parts if isinstance(part, torch.nn.Module) and part is not family.denoiser]
    assert len(others) >= 2
    assert all(weight.grad is None for module in others for weight in module.parameters())


def test_the_empty_text_is_what_the_pipeline_takes_for_unconditional(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = case.made()
    [found] = family.encode(case.briefs(("",)), SIZE)
    fed = heard(family)
    start = case.given(noise(family, 1))
    family.pipe(**asked(case.briefs(("red",))[0], start), **case.guided, output_type="latent")
    theirs = fed[0]["cap_feats"][1] if case.family is ZImage else fed[1]["encoder_hidden_states"][0]
    torch.testing.assert_close(found["embeds"], theirs)


# ---- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(18, 24), (16, 23), (0, 24), (16, -4)])
def test_sizes_that_patches_do_not_fill_are_refused(case: Case, size: tuple[int, int]) -> None:
    family = case.made()
    for refused in (family.latent_shape, lambda size: family.schedule(STEPS, size)):
        with pytest.raises(ConfigError, match=r"patches of 4 x 4 pixels, got a size of .*that 4 divides$"):
            refused(size)


def test_decoded_pictures_have_the_size_asked(case: Case) -> None:
    family = case.made()
    with torch.no_grad():
        assert [image.size for image in family.decode(noise(family, 3))] == [(24, 16)] * 3


@pytest.mark.parametrize("name", EDITING)
def test_an_editing_pipeline_refuses_a_brief_without_a_picture(name: str) -> None:
    case = CASES[name]
    with pytest.raises(ConfigError, match=r"prompt.image is missing for 'red': give every prompt an image"):
        case.made().encode([*case.briefs(("blue",)), Brief("red")], SIZE)


def test_flux_2_klein_refuses_rows_of_both_kinds_in_one_call() -> None:
    family = CASES["flux_2_klein"].made()
    rows = family.encode([Brief("red"), Brief("red", image=picture())], SIZE)
    for mixed in (rows, rows[::-1]):
        with pytest.raises(
            ConfigError, match=r"1 of 2 have prompt.image: give every prompt of a run an image, or none"
        ):
            family.collate(mixed)


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit"])
def test_qwen_image_with_distilled_guidance_is_refused_because_diffusers_cannot_run_it(name: str) -> None:
    pipe = CASES[name].build()
    transformer = pipelines.QwenImageTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    pipe.register_modules(transformer=transformer)
    brief, case = CASES[name].briefs()[0], CASES[name]
    start = torch.randn(1, 24, 16)
    with pytest.raises(TypeError, match="positional arguments"):
        pipe(**asked(brief, start), **case.unguided, guidance_scale=1.0)
    with pytest.raises(ConfigError, match="guidance_embeds, which diffusers has no embedding for"):
        case.family(pipe)


# ---- Editing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EDITING, "flux_2_klein"])
def test_another_picture_gives_another_prediction(name: str) -> None:
    family = CASES[name].made()
    x = noise(family, 1).expand(2, -1, -1, -1)
    briefs = [Brief("red", image=picture(seed)) for seed in (1, 2)]
    with torch.no_grad():
        found = family.predict(x, torch.tensor([0.5, 0.5]), conditions(family, briefs))
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*EDITING, "flux_2_klein"])
@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_a_picture_of_any_size_and_mode_is_edited_at_the_size_drawn(name: str, mode: str) -> None:
    family = CASES[name].made()
    large = picture(size=(37, 61)).convert(mode)
    resized = large.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
    [found, expected] = family.encode([Brief("red", image=large), Brief("red", image=resized)], SIZE)
    assert found["image"].shape == family.latent_shape(SIZE)
    torch.testing.assert_close(found["image"], expected["image"])
