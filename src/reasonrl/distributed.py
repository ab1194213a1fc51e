"""World: what a run asks of the other processes. Solo is one process, Ranks are those that a launcher started."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn

from reasonrl import sharding
from reasonrl.errors import ConfigError, RankError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed.device_mesh import DeviceMesh

    from reasonrl.interfaces import Trainable

T = TypeVar("T")
PATIENCE = timedelta(hours=3)
"""How long a rank waits for another: a judge may take its time, and a rank that died is the launcher's affair."""
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started."""
FAREWELL_S = 0.2
"""How long the lock is left to gloo's workers at the end."""
BUCKET = 2**25
"""Gradient elements that are summed in one message."""


class World(Protocol):
    """Sums, maxima and gathers over ranks; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Which process this is, from 0; the first writes what a run writes."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def place(self, module: nn.Module, *, sharded: bool) -> None:
        """Moves a module to this process's device, with the first rank's weights; splits it over the ranks."""

    def whole(self, trainables: Iterable[Trainable]) -> AbstractContextManager[object]:
        """Inside, ranks may call these modules as often as each likes, and read whole weights."""

    def agreed(self) -> AbstractContextManager[object]:
        """Ends for all ranks or for none: one that fails inside raises RankError on each. No other call is inside."""

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over ranks."""

    def max(self, value: int) -> int:
        """Returns the maximum over ranks."""

    def gather(self, values: list[Any]) -> list[Any]:
        """Returns the values of all ranks, in rank order."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over ranks; one that is missing everywhere stays missing."""

    def clip_gradients(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scales gradients to a norm of at most `most`, and returns the norm before; equal on every rank."""


@frozen
class Solo:
    """One process: everything is already whole."""

    device: torch.device | None = None
    """Where modules are placed; None leaves them where they are."""
    rank: int = 0
    size: int = 1

    def place(self, module: nn.Module, *, sharded: bool) -> None:
        """Moves a module to the device, if there is one."""
        if self.device is not None:
            module.to(self.device)

    def whole(self, trainables: Iterable[Trainable]) -> AbstractContextManager[object]:
        """Does nothing."""
        return nullcontext()

    def agreed(self) -> AbstractContextManager[object]:
        """Does nothing."""
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """Returns the value."""
        return value

    def max(self, value: int) -> int:
        """Returns the value."""
        return value

    def gather(self, values: list[Any]) -> list[Any]:
        """Returns the values."""
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leaves the gradients as they are."""

    def clip_gradients(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Returns the norm, and clips to it."""
        return nn.utils.clip_grad_norm_(parameters, most)


@frozen(eq=False)
class Ranks:
    """The processes of a launcher: accelerate finds device and backend, torch.distributed connects them."""

    state: PartialState

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return int(self.state.process_index)

    @property
    def size(self) -> int:
        """How many were launched."""
        return int(self.state.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return torch.device(self.state.device)

    def place(self, module: nn.Module, *, sharded: bool) -> None:
        """Gives each rank a replica of the first rank's weights, or its part of them."""
        if sharding.is_sharded(module):
            return
        if not sharded:
            module.to(self.device)
        with torch.no_grad():
            for parameter in module.parameters():  # one at a time: a device may not hold a sharded module whole
                value = parameter.to(self.device).contiguous()  # NCCL takes no other
                dist.broadcast(value, 0)
                parameter.copy_(value)
        if sharded:
            sharding.shard(module, self._mesh)

    @contextmanager
    def whole(self, trainables: Iterable[Trainable]) -> Iterator[None]:
        """Gathers the modules that are split."""
        with ExitStack() as stack:
            for trainable in trainables:
                if sharding.is_sharded(trainable.module):
                    stack.enter_context(sharding.gathered(trainable.module))
            yield

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Asks every rank at the end whether it failed."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - raised below, once the others know
            error = caught
        reasons = self.gather([None if error is None else f"{type(error).__name__}: {error}"])
        failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]
        if failed:
            raise RankError(failed[0]) from error

    def sum(self, value: Tensor) -> Tensor:
        """All-reduces a copy."""
        moved = value.detach().to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(value.device)

    def max(self, value: int) -> int:
        """Returns the largest."""
        return int(max(self.gather([value])))

    def gather(self, values: list[Any]) -> list[Any]:
        """Gathers what can be pickled."""
        found: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, values)
        return [value for part in found for value in part]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients of whole parameters; FSDP2 has summed those of split ones during backward."""
        plain = [p for p in parameters if not sharding.is_split(p)]
        if not plain or self.size == 1:
            return
        number = self.sum(torch.tensor([p.grad is not None for p in plain], dtype=torch.int64)).tolist()
        for parameter, times in zip(plain, number, strict=True):
            if times and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in plain if p.grad is not None]):
            together = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(together)
            for gradient, part in zip(bucket, together.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def clip_gradients(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Clips split and whole gradients to one norm."""
        kinds = [[p for p in parameters if sharding.is_split(p) is split] for split in (False, True)]
        gradients = [found for kind in kinds if (found := [p.grad for p in kind if p.grad is not None])]
        norms = [sharding.full(nn.utils.get_total_norm(found)) for found in gradients]
        if len(norms) != 1:
            norms = [torch.linalg.vector_norm(torch.stack([torch.zeros((), device=self.device), *norms]))]
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, most, norms[0])
        return norms[0]

    @cached_property
    def _mesh(self) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))


def launched(device: torch.device | None = None) -> World:
    """Returns Ranks where `accelerate launch`, torchrun or mpirun started this process, else Solo on the device."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if not any(name in os.environ for name in SIZES):
        if on_cpu and "MASTER_PORT" in os.environ:
            raise ConfigError(
                "`accelerate launch --cpu` was asked for several processes and started one, as it does without mpirun:"
                " use torchrun --nproc-per-node N -m reasonrl.cli train ..."
            )
        return Solo(device)
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    except ValueError as error:
        found = {name: os.environ[name] for name in (*SIZES, "RANK", "LOCAL_RANK") if name in os.environ}
        raise ConfigError(
            f"the environment says {found}, and no launcher left where to meet ({error}): start with accelerate launch"
            " or torchrun, or unset them"
        ) from error
    if not dist.is_initialized():  # job systems set a size of 1 where nobody launched anything
        return Solo(device)
    atexit.register(_end_gloo)
    return Ranks(state)


def _end_gloo() -> None:
    """Lets gloo's workers finish before the interpreter goes.

    A worker lets go of the last message's tensors after the message was delivered, and needs the interpreter's lock for
    it: where that has gone the process aborts. NCCL has no such workers, and would wait for ranks that failed.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        time.sleep(FAREWELL_S)


def best_device() -> torch.device | None:
    """Returns the first GPU, or None: on a CPU everything is where it should be."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def part_of(items: Sequence[T], world: World) -> Sequence[T]:
    """Returns this rank's part: contiguous, in rank order, the first ones longer where it does not come out even."""
    size, longer = divmod(len(items), world.size)
    start = world.rank * size + min(world.rank, longer)
    return items[start : start + size + (world.rank < longer)]


def sum_metrics(metrics: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Returns the sums over ranks, by name; a rank may lack some."""
    found: dict[str, Tensor] = {}
    for part in world.gather([dict(metrics)]):
        for name, value in part.items():
            found[name] = found[name] + value if name in found else value
    return found


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields gradients of one dtype at a time, about BUCKET elements together."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        bucket: list[Tensor] = []
        room = BUCKET
        for gradient in (g for g in gradients if g.dtype is dtype):
            if bucket and gradient.numel() > room:
                yield bucket
                bucket, room = [], BUCKET
            bucket.append(gradient)
            room -= gradient.numel()
        yield bucket
