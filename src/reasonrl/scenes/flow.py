"""The nano flow: a rectified flow over the drawn world, small enough for one core, conditioned on words and boxes.

The denoiser is diffusers' SD3Transformer2DModel at a tiny configuration, so what runs on Stable Diffusion 3 runs here.
The latents are a fixed linear map of 8x8 patches, and decoding takes the nearest patch of the codebook: pictures are
always sharp, and `parser` reads them exactly. The weights in `scenes/nano_flow/` were made in three runs, as by

    make nano-flow

and draw a correct plan exactly in about 4 of 10 pictures at 10 steps: after two runs it was 97 of 100, and the teacher
of the third errs in two fifths of the pictures. From a prompt alone they draw no whole object: boxes say
what goes where.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import torch
from attrs import frozen
from einops import rearrange
from torch import Tensor, nn

from reasonrl.errors import CheckpointError
from reasonrl.scenes.flow_parts import Conditioner, PatchLatents, principal_latents
from reasonrl.scenes.world import CELLS

INDEX = "model_index.json"
NAME = "NanoFlow"
"""The class that the index names."""
CHANNELS = 16
LEAST_TIME = 0.1
"""From this s on, the transformer's output is the data; below, (1 + c - s) x0 - (c - s) eps, c this number."""
_MODULES: dict[str, Callable[..., nn.Module]] = {"conditioner": Conditioner, "latents": PatchLatents}


@final
@frozen(eq=False)
class NanoFlow:
    """What a diffusers pipeline is for a large model: the parts, by their usual names."""

    transformer: Any
    """An SD3Transformer2DModel: takes latents, and as further channels the map; `velocity` reads what it returns."""
    scheduler: Any
    """A FlowMatchEulerDiscreteScheduler."""
    conditioner: Conditioner
    """Trained with the transformer, frozen afterwards."""
    latents: PatchLatents

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `load` reads; its transformer/ and scheduler/ are diffusers' own."""
        from diffusers import __version__
        from safetensors.torch import save_file

        folder = Path(folder)
        self.transformer.save_pretrained(folder / "transformer")
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where it was loaded from: another machine's affair
        (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.scheduler.save_pretrained(folder / "scheduler")
        for name in _MODULES:
            part: Any = getattr(self, name)
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(part.config, indent=2) + "\n", encoding="utf-8")
            save_file({k: v.contiguous() for k, v in part.state_dict().items()}, folder / name / "model.safetensors")
        index = {
            "_class_name": NAME,
            "_diffusers_version": __version__,
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            **{name: ["reasonrl.scenes.flow_parts", kind.__name__] for name, kind in _MODULES.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name, as a pipeline of diffusers has them."""
        return {"transformer": self.transformer, "scheduler": self.scheduler, **{n: getattr(self, n) for n in _MODULES}}

    def to(self, device: torch.device | str) -> NanoFlow:
        """Moves every module; returns itself."""
        for module in (self.transformer, self.conditioner, self.latents):
            module.to(device)
        return self


def velocity(x: Tensor, output: Tensor, s: Tensor) -> Tensor:
    """Returns v = eps - x0 of (N, C, 8, 8) latents at (N,) times, (x - output) / max(s, 0.1).

    A plan says nearly all of x0 and nothing of eps, so a small transformer had better return x0. The bound on s keeps
    an error of the output from becoming any larger error of v.
    """
    return (x - output) / rearrange(s.clamp(min=LEAST_TIME), "n -> n 1 1 1").to(x)


def build(*, seed: int = 0, width: int = 96, num_layers: int = 3, heads: int = 3) -> NanoFlow:
    """Returns an untrained flow; the default has 1.1M parameters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = Conditioner()
        transformer: Any = SD3Transformer2DModel(
            sample_size=CELLS,
            patch_size=1,
            in_channels=CHANNELS + conditioner.map_channels,
            out_channels=CHANNELS,
            num_layers=num_layers,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            caption_projection_dim=width,
            joint_attention_dim=conditioner.width,
            pooled_projection_dim=conditioner.width,
            pos_embed_max_size=CELLS,
        )
    for block in transformer.transformer_blocks:  # adaLN-Zero (arXiv 2212.09748): each block starts as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return NanoFlow(transformer.eval(), scheduler, conditioner.eval(), principal_latents(CHANNELS))


def load(folder: str | Path) -> NanoFlow:
    """Returns the flow of a folder, in float32; "nano" is the packaged one. CheckpointError for any other folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    folder = Path(str(files("reasonrl.scenes") / "nano_flow")) if str(folder) == "nano" else Path(folder)
    _check(folder)
    transformer: Any = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    conditioner, latents = (_load_module(folder / name, kind) for name, kind in _MODULES.items())
    return NanoFlow(transformer.eval(), scheduler, conditioner, latents)  # type: ignore[arg-type]  # by name, in order


def _load_module(folder: Path, kind: Callable[..., nn.Module]) -> nn.Module:
    from safetensors.torch import load_file

    module = kind(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    module.load_state_dict(load_file(folder / "model.safetensors"))  # copies, and so widens, into float32
    return module.eval().requires_grad_(False)


def _check(folder: Path) -> None:
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} has no {INDEX}: give a folder that NanoFlow.save_pretrained wrote, or 'nano'")
    found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if found != NAME:
        raise CheckpointError(f"{index} is of a {found}, expected {NAME}: load it with diffusers")
