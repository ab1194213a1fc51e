"""Every family of pipelines through the renderer: sampled, replayed, trained, saved, and redrawn by diffusers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from diffusers import DiffusionPipeline
from PIL import Image
from tests.renderers import tiny_pipelines as unets
from tests.renderers import tiny_transformer_pipelines as transformers
from tests.renderers.test_diffusion import Brightness
from tests.renderers.toy_family import Plans
from torch import Tensor

from reasonrl import CheckpointError, ConfigError, Draw, Prompt, Recipe, Trajectory, train
from reasonrl.noise import normal
from reasonrl.objectives import GRPO
from reasonrl.renderers import Diffusion
from reasonrl.renderers.spatial_guidance import SpatialGuidance
from reasonrl.rollout import rollouts
from reasonrl.testing import PLAN

STEPS = 3


def packed(latents: Tensor) -> Tensor:
    return transformers.FluxPipeline._pack_latents(latents, *latents.shape)


@frozen
class Case:
    """A pipeline, and what it is called with to draw without guidance."""

    build: Callable[[], Any]
    size: tuple[int, int] = (16, 24)
    asked: Mapping[str, Any] = {"guidance_scale": 1.0}
    given: Callable[[Tensor], Tensor] = lambda latents: latents
    edits: bool = False
    plan: str | None = None
    """What is drawn again: its boxes are in `asked`."""

    def prompt(self) -> Prompt:
        pixels = np.random.default_rng(0).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Prompt("one", "a red circle", image=Image.fromarray(pixels) if self.edits else None)

    def trajectory(self) -> Trajectory:
        return Trajectory(self.prompt(), texts={"reasoning": self.plan} if self.plan else {})


BOXES = {
    "gligen_phrases": ["red cup", "blue plate"],
    "gligen_boxes": [[0.1, 0.3, 0.4, 0.7], [0.55, 0.4, 0.95, 0.7]],
    "gligen_scheduled_sampling_beta": 1.0,
}
ALONE = {"true_cfg_scale": 1.0}
CASES = {
    "StableDiffusion": Case(unets.stable_diffusion),
    "StableDiffusionXL": Case(unets.stable_diffusion_xl),
    "GLIGEN": Case(unets.gligen, asked={"guidance_scale": 1.0, **BOXES}, plan=PLAN),
    "StableDiffusion3": Case(unets.stable_diffusion_3),
    "Sana": Case(unets.sana, (32, 64), {"guidance_scale": 1.0, "use_resolution_binning": False}),
    "Flux": Case(transformers.flux, asked={}, given=packed),
    "FluxKontext": Case(
        transformers.flux_kontext, asked={"max_area": 16 * 24, "_auto_resize": False}, given=packed, edits=True
    ),
    "Flux2Klein": Case(transformers.flux_2_klein),
    "QwenImage": Case(transformers.qwen_image, asked=ALONE, given=packed),
    "QwenImageEdit": Case(transformers.qwen_image_edit, asked=ALONE, given=packed, edits=True),
    "ZImage": Case(transformers.z_image, asked={"guidance_scale": 0.0}),
}


@pytest.fixture(autouse=True)
def pictures_are_edited_at_the_size_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit's pipeline resizes them to about a million pixels, whatever size it draws."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (24, 16, None))


def trained_a_step(model: Diffusion, prompt: Prompt) -> dict[str, float]:
    """Returns the metrics of one step of the loop as it is."""
    recipe = Recipe(
        Plans(),
        Brightness(),
        prompts=[prompt],
        renderer=model,
        objectives={"image": GRPO(clip=1e-3)},
        group_size=3,
        steps=1,
        num_actions=2,
        learning_rate=1e-3,
    )
    seen: dict[str, float] = {}

    def observe(event: str, **facts: Any) -> None:
        if event == "update_end":
            seen.update(
                {name: float(value) for name, value in facts["metrics"].items()}, norm=float(facts["grad_norm"])
            )

    train(recipe, rollouts(recipe, [prompt]), observe=observe)
    return seen


TRAINED = [(name, 2 * (i % 2)) for i, name in enumerate(CASES)] + [("StableDiffusion", 2), ("Flux", 0)]
"""Wholly, or by adapters of that rank."""


@pytest.mark.parametrize(("name", "rank"), TRAINED)
def test_a_family_is_trained_and_saved_and_diffusers_alone_redraws_its_picture(name: str, rank: int, tmp_path: Path):
    case = CASES[name]
    case.build().save_pretrained(tmp_path / "start")
    model = Diffusion(str(tmp_path / "start"), text="prompt", num_steps=STEPS, size=case.size, lora_rank=rank)
    prompt = case.prompt()
    exact = evolve(model, window="none")
    (before,) = exact.render([case.trajectory()], draw=Draw(0, 0))
    seen = trained_a_step(model, prompt)
    assert seen["image/ratio"] == pytest.approx(1, abs=1e-5)
    assert 0 < seen["norm"] < float("inf")
    learned = [n for n, p in model.module.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in learned) if rank else len(learned) == len(list(model.module.parameters()))

    with torch.no_grad():  # far enough to see in whole levels of 255, whatever the step was
        for i, parameter in enumerate(p for p in model.module.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    (after,) = exact.render([case.trajectory()], draw=Draw(0, 0))
    model.save(tmp_path / "trained")
    (again,) = exact.render([case.trajectory()], draw=Draw(0, 0))
    assert after.image.tobytes() == again.image.tobytes()  # saving changes nothing
    assert after.image.tobytes() != before.image.tobytes()

    alone = DiffusionPipeline.from_pretrained(tmp_path / "trained", use_safetensors=True)
    alone.set_progress_bar_config(disable=True)
    noise = normal([Draw(0, 0).key("one", (), "image", "start")], *model.family.latent_shape(case.size))
    picture = {"image": prompt.image} if case.edits else {}
    height, width = case.size
    drawn = alone(
        prompt=prompt.text,
        latents=case.given(noise),
        num_inference_steps=STEPS,
        height=height,
        width=width,
        **picture,
        **case.asked,
    ).images[0]
    levels = [np.asarray(image, dtype=int) for image in (drawn, after.image)]
    assert np.abs(levels[0] - levels[1]).max() <= 1  # of 255: a rounding may fall to the other side
    assert (tmp_path / "trained" / "adapter").is_dir() == bool(rank)
    loaded = Diffusion(str(tmp_path / "trained"), text="prompt", num_steps=STEPS, size=case.size, window="none")
    (reloaded,) = loaded.render([case.trajectory()], draw=Draw(0, 0))
    assert np.abs(np.asarray(reloaded.image, dtype=int) - levels[1]).max() <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusion3", "Flux"])
def test_half_precision_weights_replay_what_they_drew(name: str, dtype: str, tmp_path: Path):
    case = CASES[name]
    case.build().save_pretrained(tmp_path)
    model = Diffusion(str(tmp_path), num_steps=STEPS, size=case.size, dtype=dtype, storage=dtype, lora_rank=2)
    assert trained_a_step(model, case.prompt())["image/ratio"] == pytest.approx(1, abs=2e-2)
    assert {p.dtype for n, p in model.module.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_nano_flow_learns_in_half_precision(dtype: str):
    model = Diffusion("nano", num_steps=STEPS, dtype=dtype, storage=dtype, lora_rank=2)
    assert trained_a_step(model, Prompt("one", "a red circle"))["image/ratio"] == pytest.approx(1, abs=2e-2)


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path: Path):
    unets.stable_diffusion_3().save_pretrained(tmp_path)
    norms = [
        trained_a_step(Diffusion(str(tmp_path), num_steps=STEPS, gradient_checkpointing=again), Prompt("one", "red"))[
            "norm"
        ]
        for again in (False, True)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# ---- Bad input ----


def test_a_pipeline_without_an_adapter_is_refused_by_name(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion2Pipeline"}')
    with pytest.raises(
        ConfigError, match=r"a StableDiffusion2Pipeline, and no adapter .* Did you mean 'StableDiff"
    ) as e:
        _ = Diffusion(str(tmp_path)).module
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"_class_name": ["x"]}'])
def test_a_folder_that_is_no_pipeline_is_refused(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=r"is no diffusers pipeline|no adapter"):
        _ = Diffusion(str(tmp_path)).module


def test_a_widened_model_is_refused_by_what_does_not_fill_it(tmp_path: Path):
    unets.stable_diffusion_3().save_pretrained(tmp_path / "plain")
    boxes = SpatialGuidance()
    Diffusion(str(tmp_path / "plain"), boxes=boxes).save(tmp_path / "wide")
    assert Diffusion(str(tmp_path / "wide"), boxes=boxes).module is not None
    with pytest.raises(ConfigError, match="takes 12 channels and would be given 4: one widened for boxes needs"):
        _ = Diffusion(str(tmp_path / "wide")).module
    with pytest.raises(ConfigError, match=r"SpatialGuidance gives the denoiser new weights .* set dtype='float32'"):
        _ = Diffusion(str(tmp_path / "plain"), boxes=boxes, dtype="bfloat16", lora_rank=2).module


def test_a_missing_folder_is_refused():
    with pytest.raises(CheckpointError, match=r"no pipeline at \./nowhere: give a folder, 'nano', or a Hub name"):
        _ = Diffusion("./nowhere").module


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path):
    unets.stable_diffusion_3().save_pretrained(tmp_path)
    torch.save({}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded as a StableDiffusion3Pipeline"):
        _ = Diffusion(str(tmp_path)).module


def test_a_scheduler_without_a_density_is_refused_in_one_line(tmp_path: Path):
    from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler, FlowMatchHeunDiscreteScheduler

    for build, scheduler in [
        (unets.stable_diffusion_3, FlowMatchHeunDiscreteScheduler()),
        (unets.stable_diffusion, EDMEulerScheduler()),
        (unets.stable_diffusion, CMStochasticIterativeScheduler()),
    ]:
        folder = tmp_path / type(scheduler).__name__
        pipe = build()
        pipe.scheduler = scheduler
        pipe.save_pretrained(folder)
        with pytest.raises(
            ConfigError, match=f"{type(scheduler).__name__} .*(no steps with a density|expected)"
        ) as refused:
            _ = Diffusion(str(folder)).module
        assert "\n" not in str(refused.value)


def test_other_samplers_of_the_same_model_are_replaced_by_one_whose_steps_have_densities(tmp_path: Path):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

    pipe = unets.stable_diffusion()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "sd")
    assert isinstance(Diffusion(str(tmp_path / "sd")).family.pipe.scheduler, DDIMScheduler)
    pipe = unets.sana()
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe.save_pretrained(tmp_path / "sana")
    found = Diffusion(str(tmp_path / "sana")).family.pipe.scheduler
    assert isinstance(found, FlowMatchEulerDiscreteScheduler)
    assert found.config.shift == 3.0
