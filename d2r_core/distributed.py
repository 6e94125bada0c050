"""One training on several processes (`torchrun`): who this one is, and what they tell each other.

Without `torchrun` everything here is the single process's own answer.
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
    """Join the process group that torchrun's variables describe, for the block: NCCL on GPUs, gloo on CPUs.

    Also after an elastic restart (`torchrun --max-restarts`), on one machine or many. `timeout` is how long one process
    may wait for another: by default PyTorch's, 10 and 30 minutes.
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
    """A name for this start of the job that all its ranks agree on, and none of an earlier start had.

    torchrun's agent keeps one store through all restarts, so there a rank may find the addresses of processes that are
    dead. The restart count cannot tell them apart: machines count only what failed on their own side. So rank 0 draws
    a name, and welcomes each rank by a name of its own, which a dead rank 0 cannot.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, world):
            store.set(f"{mine}/welcome/{store.get(f'{mine}/hello/{other}').decode()}", "")
        return mine
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/hello/{rank}", mine)
        if store.check([f"{attempt}/welcome/{mine}"]):
            return attempt
        time.sleep(0.05)


def rank() -> int:
    """This process's number, 0 to `world() - 1`; 0 alone writes and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on every rank."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def first_of(value: str | None) -> str | None:
    """The first rank's value that is not None, on every rank: what one rank knows, all do."""
    if not dist.is_initialized():
        return value
    values: list[str | None] = [None] * world()
    dist.all_gather_object(values, value)
    return next((found for found in values if found is not None), None)


def from_first(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def share_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers: BatchNorm's running statistics differ, each rank having seen its own images."""
    if dist.is_initialized():
        # What is no float counts the batches, alike on every rank.
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        values = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(values, 0)
        for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))


def wrapped(objective: nn.Module) -> nn.Module:
    """`objective`, with gradients averaged over the ranks by its backward pass. Buffers are left to share_buffers."""
    if not dist.is_initialized():
        return objective
    return nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
