"""How many trajectories are drawn at once: as many as free memory holds, decided once, in powers of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from attrs import frozen

from reasonrl.errors import ConfigError
from reasonrl.sharding import is_split, local

if TYPE_CHECKING:
    from reasonrl.policies.janus import JanusModule

MOST = 256
"""Trajectories at once; beyond it a GPU's products are no faster."""
SHARES = {"cuda": 0.85, "cpu": 0.5}
"""Of free memory; on a CPU other programs live there too."""
LOGIT_COPIES = 8
"""Float32 copies of a row's logits on the way to its token."""


@frozen
class SamplingPlan:
    """Whole groups that are drawn at once."""

    groups: int
    group_size: int
    row_bytes: int
    """Most memory that one trajectory takes, its reasoning as long as it may be."""
    fixed_bytes: int
    """Taken once: weights made ready on a CPU, room for the optimizer's moments."""
    free_bytes: int

    def __str__(self) -> str:
        rows = self.groups * self.group_size
        return (
            f"draws {rows} trajectories at once: at most {_size(rows * self.row_bytes + self.fixed_bytes)} of"
            f" {_size(self.free_bytes)} free ({_size(self.row_bytes)} each; sample_rows pins it)"
        )


def planned(
    module: JanusModule, *, group_size: int, prompt_tokens: int, max_tokens: int, guided: bool, images_per_plan: int
) -> SamplingPlan:
    """Returns the plan for the memory that is free now; ConfigError where not even one group fits."""
    device = next(module.parameters()).device
    free = free_bytes(device)
    row = row_bytes(
        module,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        guided=guided,
        images_per_plan=images_per_plan,
    )
    fixed = fixed_bytes(module)
    room = int(free * SHARES.get(device.type, SHARES["cpu"])) - fixed
    groups = min(room // (row * group_size), max(1, MOST // group_size))
    if groups < 1:
        raise ConfigError(
            f"to draw one group of {group_size} takes {_size(row * group_size + fixed)} ({_size(row)} a trajectory of"
            f" at most {max_tokens} reasoning tokens, {_size(fixed)} once), and {_size(free)} are free on {device}:"
            " lower max_tokens or group_size, or set sample_rows to try it anyway"
        )
    return SamplingPlan(2 ** (groups.bit_length() - 1), group_size, row, fixed, free)


def row_bytes(module: JanusModule, *, prompt_tokens: int, max_tokens: int, guided: bool, images_per_plan: int) -> int:
    """Returns the most bytes that one trajectory takes while it is drawn."""
    text = module.model.config.text_config
    weight = next(module.parameters())
    size = weight.element_size() if weight.is_cuda else max(4, weight.element_size())
    heads = text.num_key_value_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * size
    images, plans = int(module.model.config.vision_config.num_image_tokens), images_per_plan
    # Reasoning that has finished is put away, and then into a cache with room for its image. When rows leave, at most
    # three quarters go on: their cache and what is copied into it stand beside the old one, and beside what left.
    writing = max(2 * max_tokens + images, 2.75 * max_tokens) / plans
    # Rows that share a plan see a copy of it and of its prompt.
    behind = max_tokens if plans == 1 else (2 * max_tokens + images + prompt_tokens) / plans
    drawing = behind + images * (2 if guided else 1)
    longest = prompt_tokens + max_tokens + images
    scores = 3 * 4 * text.num_attention_heads * longest * (2 if guided else 1)
    return int(token * (max(writing, drawing) + prompt_tokens) + 4 * LOGIT_COPIES * text.vocab_size + scores)


def fixed_bytes(module: JanusModule) -> int:
    """Returns the bytes that drawing takes once, and those that AdamW's two moments will take.

    Of a split module this process holds a part, and while it draws the whole.
    """
    learns = sum(2 * local(p).nbytes for p in module.parameters() if p.requires_grad)
    learns += sum(p.numel() * p.element_size() for p in module.parameters() if is_split(p))
    if next(module.parameters()).is_cuda:
        return learns
    language = sum(p.numel() * p.element_size() for p in module.model.model.language_model.layers.parameters())
    heads = (module.model.lm_head, module.model.model.generation_head.vision_head)
    return learns + language + sum(4 * head.weight.numel() for head in heads)


def free_bytes(device: torch.device) -> int:
    """Returns the memory that could be allocated now, the allocator's own free blocks included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    sharers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return int(psutil.virtual_memory().available) // sharers


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"
