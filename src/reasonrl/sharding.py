"""Sharding: a module's parameters split over ranks (FSDP2), and whole again where somebody needs them so."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from reasonrl.errors import ConfigError


def is_split(tensor: Tensor) -> bool:
    """Returns whether each rank holds a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a split tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Returns a split tensor whole, any other as it is; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(value: Tensor, example: Tensor) -> Tensor:
    """Returns a whole value that every rank holds, split and placed as the example is; asks no other rank."""
    if not isinstance(example, DTensor):
        return value.to(example.device)
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a module's parameters over the mesh, in place: each block by itself, and the rest with the root.

    A block is a member of a module list, such as a decoder layer; every pass must call the same ones on every rank.
    """
    parts = [block for block in _blocks(module) if next(block.parameters(), None) is not None]
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    rest = {id(parameter) for parameter in module.parameters()} - inside
    _check_dtypes(module, [{id(parameter) for parameter in part.parameters()} for part in parts] + [rest])
    module.register_forward_hook(_Agreement(module, rest, mesh))  # before FSDP2's: it has to end a backward first
    for part in [*parts, module]:
        # The root too: torch would keep it gathered after a forward, where swapped weights do not reach it.
        split = fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=_precision(part))
        split.set_gradient_divide_factor(1.0)  # a sum, as the loss is
        split.set_force_sum_reduction_for_comms(True)


def is_sharded(module: nn.Module) -> bool:
    """Returns whether the module was split."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, a split module holds whole plain parameters, and its forward asks no other rank; every rank enters.

    Ranks may then call it as often as each needs. What is done to the whole parameters is lost on the way out.
    """
    hooks = [(table, dict(table)) for part in module.modules() for table in _forward_hooks(part)]
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    whole: dict[int, nn.Parameter] = {}
    try:
        with torch.no_grad():
            for owner in module.modules():
                for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
                    if isinstance(parameter, DTensor):
                        held.append((owner, name, parameter))
                        if id(parameter) not in whole:
                            plain = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
                            whole[id(parameter)] = plain
                        setattr(owner, name, whole[id(parameter)])
        for table, found in hooks:
            for key, hook in found.items():
                if _is_ours(hook):
                    del table[key]
        yield
    finally:
        for owner, name, parameter in held:
            setattr(owner, name, parameter)
        for table, found in hooks:
            table.clear()
            table.update(found)


class _Agreement:
    """Ends a backward by giving a gradient of zeros to the root's parameters that only other ranks used.

    FSDP2 reduces the gradients that there are, in one message: ranks that differ would wait for each other for ever.
    It is a hook on the root's forward.
    """

    def __init__(self, module: nn.Module, rest: set[int], mesh: DeviceMesh) -> None:
        self.mesh, self.queued = mesh, False
        self.places = [
            (owner, name)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) in rest
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.queued = False
        return tree_map(self._watched, output)

    def _watched(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        value = value.clone() if value._is_view() else value  # FSDP2 warns of hooks on views
        value.register_hook(self._begin)
        return value

    def _begin(self, gradient: Tensor) -> None:
        if not self.queued:
            self.queued = True
            Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.queued = False
        parameters = [getattr(owner, name) for owner, name in self.places]
        flags = [p.grad is not None for p in parameters]
        used = torch.tensor(flags, dtype=torch.uint8, device=self.mesh.device_type)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.mesh.get_group())
        for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the members of the outermost module lists."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)


def _precision(part: nn.Module) -> MixedPrecisionPolicy:
    short = any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in part.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if short else None)


def _check_dtypes(module: nn.Module, groups: list[set[int]]) -> None:
    for group in groups:
        found: dict[str, str] = {}
        for name, parameter in module.named_parameters():
            if id(parameter) in group and parameter.requires_grad:
                found.setdefault(str(parameter.dtype).removeprefix("torch."), name)
        if len(found) > 1:
            which = ", ".join(f"{name} in {dtype}" for dtype, name in found.items())
            raise ConfigError(
                f"sharded=True needs one dtype for what learns in a block, got {which}: train fewer parts, or set"
                " sharded=False"
            )


def _forward_hooks(part: nn.Module) -> tuple[MutableMapping[int, Any], ...]:
    return (part._forward_pre_hooks, part._forward_hooks)


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(hook, _Agreement) or type(owner).__module__.startswith("torch.distributed.fsdp.")
