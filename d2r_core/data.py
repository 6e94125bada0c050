"""Prepared splits, and batches of them on the device with a random crop and flip for each image."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2r_core import files
from d2r_core.errors import UserError
from d2r_core.files import atomic


class Split(NamedTuple):
    """Images uint8 (N, 3, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, int64 (M,), in that order."""
        return Split(self.images[index], self.labels[index])

    def __len__(self) -> int:  # images, not the tuple's two fields
        return len(self.labels)


def save_split(path: Path, split: Split) -> None:
    """Write `split` to a safetensors file, atomically."""
    with atomic(path) as temporary:
        save_file({"images": split.images.contiguous(), "labels": split.labels.contiguous()}, temporary)


def load_split(path: Path) -> Split:
    """Read a prepared split.

    Raises:
        UserError: the file is missing, damaged, or does not hold images and labels of the right kind.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            split = Split(tensors.get_tensor("images"), tensors.get_tensor("labels"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as prepared data ({error}). `dvc repro prepare` makes it.") from None
    try:
        require_uint8(split)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return split


def require_uint8(*splits: Split) -> None:
    """Raise ValueError unless images are uint8 (N, 3, H, W) and labels int64 (N,): of floats the range is not known."""
    for images, labels in splits:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, 3, H, W).")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},).")


def content_hash(splits: Mapping[str, Split]) -> str:
    """`files.content_hash` of splits in memory; two files with the same content have the same hash."""

    def raw(tensor: Tensor) -> memoryview:
        return tensor.contiguous().view(-1).numpy().data  # no copy: a mapped file's pages are read as they are hashed

    return files.content_hash(
        {name: (tuple(split.images.shape), map(raw, (split.labels, split.images))) for name, split in splits.items()}
    )


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 ones divided by 255, float ones, which are in [0, 1], as they are."""
    return images.float().div_(255.0) if images.dtype == torch.uint8 else images.float()


def balanced_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order of all images, int64 (N,), in which every prefix is as class-balanced as possible."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(shuffled)
    for label in labels.unique():
        members = labels[shuffled] == label
        rank[members] = torch.arange(int(members.sum()))
    return shuffled[rank.argsort(stable=True)]


def crop_and_flip(images: Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels over a black border and mirror half of them.

    Args:
        images: (B, C, H, W), any type, on the device of `generator`. The result is channels last if it is cropped.
    """
    batch, _, height, width = images.shape
    device = images.device
    if padding:
        shifts = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
        rows = shifts[0] + torch.arange(height, device=device)
        columns = shifts[1] + torch.arange(width, device=device)
        padded = F.pad(images, (padding,) * 4)
        index = torch.arange(batch, device=device)[:, None, None]
        # Advanced indices around a slice put the channels last: (B, H, W, C).
        images = padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirror = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
        images = torch.where(mirror, images.flip(-1), images)
    return images


def rank_batches(order: Tensor, batch_size: int, *, rank: int = 0, world: int = 1) -> list[Tensor]:
    """The batches of one epoch for one of `world` processes: this rank's part of every `batch_size` images.

    Args:
        order: indices of images, int64 (N,), the same on all ranks. Ranks get equally many images of a batch, so that
            the mean of their gradients is the batch's; for that, up to `world` - 1 images of the last batch are left
            out.
    """
    divisible = [batch[: len(batch) // world * world] for batch in order.split(batch_size)]
    return [batch[rank::world] for batch in divisible if len(batch)]


def load_batch(
    split: Split, index: Tensor, device: torch.device, *, padding: int, flip: bool, generator: torch.Generator
) -> Split:
    """The images at `index` on `device`, cropped and flipped, as float32 (B, 3, H, W) in [0, 1], channels last.

    A split that is not on the device is streamed: gathered from the file's pages into pinned memory, and copied from
    there without blocking the host.
    """
    is_streamed = split.labels.device.type != device.type  # a plain "cuda" names the GPU "cuda:0" as well
    index = index.to(split.labels.device)

    def gather(tensor: Tensor) -> Tensor:
        shape = (len(index), *tensor.shape[1:])
        pinned = torch.empty(shape, dtype=tensor.dtype, pin_memory=True) if is_streamed else None
        # PyTorch does not reuse pinned memory before the copy from it is complete.
        return torch.index_select(tensor, 0, index, out=pinned).to(device, non_blocking=True)

    images, labels = map(gather, split)
    augmented = crop_and_flip(images, padding=padding, flip=flip, generator=generator)
    return Split(to_float(augmented).contiguous(memory_format=torch.channels_last), labels)
