"""One training on several processes (`torchrun`): who this one is, and what they tell each other.

Without `torchrun` everything here is the single process's own answer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the process group that torchrun's variables describe, for the block: NCCL on GPUs, gloo on CPUs.

    `timeout` is how long one process may wait for another: by default PyTorch's, 10 and 30 minutes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


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
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wrapped(objective: nn.Module) -> nn.Module:
    """`objective`, with gradients averaged over the ranks by its backward pass."""
    if not dist.is_initialized():
        return objective
    return nn.parallel.DistributedDataParallel(objective)
