"""Pipelines: loading one of diffusers, choosing its adapter, what of it learns, and saving it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen
from torch import nn

from reasonrl import registry
from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.renderers.family import Family

if TYPE_CHECKING:
    from reasonrl.renderers.boxes import Boxes

NANO = "nano"
"""The packaged flow over the drawn world."""
NANO_PIPELINE = "NanoFlow"
"""What its model_index.json calls it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention's linear layers in diffusers' models, of the image and of the text."""
LEAST_ALPHA_BAR = 2.0**-24
LORA_SEED = 0
"""Of the adapters' first halves; their second halves start at 0."""


@frozen
class Learns:
    """What of the denoiser learns: all of it, or, with `rank` > 0, low-rank adapters (LoRA, arXiv 2106.09685)."""

    rank: int = 0
    alpha: float = 64.0
    recomputes: bool = False
    """Layers keep their inputs alone and compute the rest again in backward (gradient checkpointing)."""


@define(eq=False)
class Loader:
    """Holds what was loaded, so that variants of a renderer (`attrs.evolve`) share its weights, trained ones too."""

    _loaded: dict[object, Family] = field(factory=dict)

    def load(self, checkpoint: str, dtype: str, learns: Learns, boxes: Boxes) -> Family:
        """Returns the checkpoint in its adapter, loading it once; raises CheckpointError or ConfigError."""
        key = (checkpoint, dtype, learns, boxes)
        if key not in self._loaded:
            self._loaded[key] = load_family(checkpoint, dtype, learns, boxes)
        return self._loaded[key]


def load_family(checkpoint: str, dtype: str, learns: Learns, boxes: Boxes) -> Family:
    """Returns a pipeline in its adapter: frozen but for what learns, with a scheduler whose steps have densities."""
    with quiet():
        family = _opened(checkpoint, DTYPES[dtype])
        scheduler = scheduler_with_density(family.pipe.scheduler, flow=family.flow)
        if scheduler is not family.pipe.scheduler:
            family.pipe.scheduler = scheduler
        for part in _modules(family.pipe):
            part.requires_grad_(False)
            part.eval()
        boxes.prepare(family)
        _refuse_other_input(checkpoint, family, boxes)
        _prepare(family, learns, boxes)
        if torch.cuda.is_available():  # the process's own GPU, as for what is trained
            for part in _modules(family.pipe):
                part.to("cuda")
    return family


def _opened(checkpoint: str, dtype: torch.dtype) -> Family:
    if checkpoint == NANO:
        return _nano(checkpoint, dtype)
    folder = pipeline_folder(checkpoint)
    name = _pipeline_name(folder)
    if name == NANO_PIPELINE:
        return _nano(str(folder), dtype)
    known = [component.name for component in registry.components("families")]
    if name not in known:
        raise ConfigError(
            f"{checkpoint} is a {name}, and no adapter draws with that.{registry.did_you_mean(name, known)} Known:"
            f" {', '.join(known)}; a package can offer one in the entry-point group reasonrl.families"
        )
    adapter: type[Family] = registry.load("families", name)
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ConfigError(f"{checkpoint} is a {name}, which diffusers {diffusers.__version__} lacks: update diffusers")
    absent = {part: None for part in ("safety_checker", "feature_extractor") if part in kind._optional_components}
    try:
        pipe = kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **absent)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded as a {name}: {registry.one_line(error)}") from error
    return adapter(pipe)


def _nano(checkpoint: str, dtype: torch.dtype) -> Family:
    from reasonrl.scenes import flow

    adapter: type[Family] = registry.load("families", NANO_PIPELINE)
    pipe = flow.load(checkpoint)
    pipe.transformer.to(dtype)  # boxes and patches are read in float32
    return adapter(pipe)


def pipeline_folder(checkpoint: str) -> Path:
    """Returns a pipeline's folder, or the downloaded files of that Hub repository; raises CheckpointError."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(f"no pipeline at {checkpoint}: give a folder, 'nano', or a Hub name like owner/model")
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(DiffusionPipeline.download(checkpoint, use_safetensors=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no folder {checkpoint}, and the Hub did not give it ({registry.one_line(error)}): check the name and the"
            " network, or give a folder"
        ) from error


def _pipeline_name(folder: Path) -> str:
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no diffusers pipeline: expected model_index.json with its _class_name"
            f" ({registry.one_line(error)})"
        ) from error
    return str(name)


def scheduler_with_density(scheduler: Any, *, flow: bool) -> Any:
    """Returns a scheduler whose times our kernels step over: the pipeline's own, or Euler's or DDIM's of its config.

    Raises ConfigError for one whose steps have no Gaussian of a known mean: samplers of other models.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config, name = scheduler.config, type(scheduler).__name__
    if flow:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not config.get("invert_sigmas"):
            return scheduler
        if config.get("use_flow_sigmas"):
            return FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=config.num_train_timesteps, shift=config.get("flow_shift", 1.0)
            )
        wanted = "FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas"
    else:
        if "beta_schedule" in config and config.get("prediction_type") in ("epsilon", "v_prediction"):
            found = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
            # Models trained to a signal of 0 (rescale_betas_zero_snr) begin at alpha_bar 0, from which no step leads.
            found.alphas_cumprod.clamp_(min=LEAST_ALPHA_BAR)
            return found
        wanted = "one with a beta_schedule and prediction_type epsilon or v_prediction"
    raise ConfigError(
        f"{name} (prediction_type {config.get('prediction_type')}) has no steps with a density here: expected {wanted};"
        " replace it in the pipeline's folder with pipe.scheduler = ...; pipe.save_pretrained(folder)"
    )


def follow(family: Family, device: torch.device) -> None:
    """Brings what encodes and decodes to where the denoiser was put."""
    for part in _modules(family.pipe):
        if part is not family.denoiser and any(value.device != device for value in part.parameters()):
            part.to(device)


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _refuse_other_input(checkpoint: str, family: Family, boxes: Boxes) -> None:
    given, taken = family.latent_shape(family.size)[0] + boxes.channels(family), family.input_channels
    if taken is not None and taken != given:
        raise ConfigError(
            f"{checkpoint} takes {taken} channels and would be given {given}: one widened for boxes needs"
            " boxes=SpatialGuidance(), one for inpainting is no text-to-image model"
        )


def _prepare(family: Family, learns: Learns, boxes: Boxes) -> None:
    denoiser: Any = family.denoiser
    if learns.recomputes:
        denoiser.enable_gradient_checkpointing()
    if not learns.rank:
        denoiser.requires_grad_(True)
        return
    from peft import LoraConfig
    from peft.tuners.tuners_utils import cast_adapter_dtype

    settings = LoraConfig(
        r=learns.rank, lora_alpha=learns.alpha, lora_dropout=0.0, bias="none", target_modules=list(LORA_LAYERS)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(LORA_SEED)
        denoiser.add_adapter(settings)
    cast_adapter_dtype(denoiser, "default")  # to float32: a step of 1e-5 is lost on most bfloat16 weights
    added = boxes.added(denoiser)
    if added and denoiser.dtype != torch.float32:
        raise ConfigError(
            f"{type(boxes).__name__} gives the denoiser new weights that learn beside the adapters, and"
            f" dtype={str(denoiser.dtype).removeprefix('torch.')} would round their steps away: set dtype='float32'"
        )
    for part in added:
        part.requires_grad_(True)


def save(family: Family, folder: Path) -> None:
    """Writes a pipeline that diffusers alone loads: adapters merged, and apart in adapter/."""
    folder.mkdir(parents=True, exist_ok=True)
    denoiser: Any = family.denoiser
    with quiet(), _merged(denoiser):
        family.save(folder)
    if getattr(denoiser, "peft_config", None):
        with quiet():
            denoiser.save_lora_adapter(folder / "adapter")


@contextlib.contextmanager
def _merged(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser has plain layers that hold their adapters' weights; bit-identical afterwards."""
    if not getattr(denoiser, "peft_config", None):
        yield
        return
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: m for name, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
    kept = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            base, parent = layer.get_base_layer(), denoiser.get_submodule(name.rpartition(".")[0])
            base.weight.data = (kept[name].float() + layer.get_delta_weight("default").float()).to(kept[name].dtype)
            setattr(parent, name.rpartition(".")[2], base)
        yield
    finally:
        for name, layer in layers.items():
            layer.get_base_layer().weight.data = kept[name]
            setattr(denoiser.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the loading bars and warnings of diffusers and transformers: what matters is raised by us."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)
            library.enable_progress_bar()
