"""Which parts of a Janus model learn, and how: whole, or through low-rank adapters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

PARTS = {
    "language_model": ("model.language_model.layers.", "model.language_model.norm."),
    "embeddings": ("model.language_model.embed_tokens.", "model.generation_embeddings.", "model.generation_aligner."),
    "heads": ("lm_head.", "model.generation_head."),
}
LAYERS = r"model\.language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The language model's linear layers, as a pattern of whole names."""
SCALE_SEED = 0
"""Of the adapters' first halves; their second halves start at 0."""


@frozen
class Trained:
    """What learns. `rank` > 0: adapters of the language model's linear layers learn instead of the layers."""

    parts: tuple[str, ...]
    rank: int = 0
    alpha: float = 32.0
    recomputes: bool = False
    """Layers keep their inputs alone and compute the rest again in backward (gradient checkpointing)."""

    def prepare(self, model: JanusForConditionalGeneration) -> None:
        """Freezes what does not learn, adds the adapters, and sets recomputation."""
        if self.recomputes:
            language = model.model.language_model
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer releases rename it, older ones know no other
                language.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            language.train()  # transformers recomputes in this mode only; there is no dropout to switch on
        prefixes = tuple(prefix for part in self.parts for prefix in PARTS[part])
        model.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied weight is of both its parts
            if name.startswith(prefixes):
                parameter.requires_grad_(True)
        if self.rank:
            learns = {parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            inside = {p for n, p in model.named_parameters() if n.startswith(PARTS["language_model"])}
            _add_adapters(model, self.rank, self.alpha)
            for parameter in learns - inside:
                parameter.requires_grad_(True)


def _add_adapters(model: JanusForConditionalGeneration, rank: int, alpha: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SCALE_SEED)
        inject_adapter_in_model(settings, model)
    cast_adapter_dtype(model, "default")  # to float32: a step of 1e-5 is lost on most bfloat16 weights


def save_adapters(model: JanusForConditionalGeneration, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, adapter_name="default")
    named = {f"base_model.model.{name}": value.detach().contiguous() for name, value in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def has_adapters(model: JanusForConditionalGeneration) -> bool:
    """Returns whether the model was given adapters."""
    return getattr(model, "peft_config", None) is not None


def merged_weights(model: JanusForConditionalGeneration) -> dict[str, Tensor]:
    """Returns the weights under the names of a model without adapters, each adapter added to its layer."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = value
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = found[f"{name}.weight"]
            found[f"{name}.weight"] = (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
    return found
