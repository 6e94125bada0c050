"""One training or evaluation on several processes (`torchrun`): rank, world size and collectives.

Without `torchrun` there is one process of rank 0, and every collective returns its own value.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the process group that torchrun's environment describes, for the block: NCCL on GPUs, gloo on CPUs.

    Works after an elastic restart (`torchrun --max-restarts`) too, on one machine or many. `timeout` limits how long a
    process waits for another: by default PyTorch's 10 minutes (NCCL) or 30 (gloo).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(_attempt(store, rank, world), store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _attempt(store: Store, rank: int, world: int) -> str:
    """A name for this start of the job, the same on all its ranks and unlike that of any earlier start.

    torchrun's agent keeps one store through all restarts, which may hold the addresses of dead processes. The restart
    count cannot tell them apart: each machine counts only its own failures. So rank 0 draws a random name and
    acknowledges each rank's random token under it, which a dead rank 0 cannot do.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", token)
        for other in range(1, world):
            store.set(f"{token}/acknowledged/{store.get(f'{token}/joining/{other}').decode()}", "")
        return token
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/joining/{rank}", token)
        if store.check([f"{attempt}/acknowledged/{token}"]):
            return attempt
        time.sleep(0.05)


def rank() -> int:
    """This process's rank, 0 to `world() - 1`; rank 0 alone writes and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The elementwise sum of all ranks' tensors, on every rank."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of all ranks' tensors, on every rank."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized():
        return tensor
    reduced = tensor.clone()
    dist.all_reduce(reduced, operation)
    return reduced


def first_not_none(value: str | None) -> str | None:
    """The value of the lowest rank whose value is not None, on every rank; None if there is none."""
    if not dist.is_initialized():
        return value
    values: list[str | None] = [None] * world()
    dist.all_gather_object(values, value)
    return next((candidate for candidate in values if candidate is not None), None)


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: BatchNorm's statistics differ, since each rank sees its own images."""
    if dist.is_initialized():
        # The integer buffers count batches and are equal on all ranks.
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        values = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(values, 0)
        for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))


def wrap_ddp(module: nn.Module) -> nn.Module:
    """`module` with its gradients averaged over the ranks in the backward pass; buffers are left to broadcast_buffers.

    Without a process group it is the module itself.
    """
    if not dist.is_initialized():
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
