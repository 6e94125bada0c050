"""Which images a version was trained or selected on: hashes of their pixels, among the files of the version.

When data have grown or were split anew, a test image of today may have been a training image of the champion. The gate
leaves it out of the comparison.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2r_core import data
from tasks.config.paths import Paths

FILE = "training_images.safetensors"
_SPLITS = ("train", "validation")


def write(paths: Paths, folder: Path) -> None:
    """Write the hashes of the prepared training and validation images into `folder`."""
    splits = (paths.prepared / f"{split}.safetensors" for split in _SPLITS)
    hashes = torch.cat([_hashes(data.load_split(path).images) for path in splits if path.exists()])
    save_file({"sha256": hashes.unique()}, folder / FILE)


def among(folder: Path, images: Tensor) -> Tensor:
    """Which of these images, uint8 (N, 3, H, W), the version with its files in `folder` was trained on: bool (N,)."""
    return torch.isin(_hashes(images), load_file(folder / FILE)["sha256"])


def _hashes(images: Tensor) -> Tensor:
    """The first 8 bytes of the SHA-256 of each image's pixels, as int64 (N,)."""
    digests = (hashlib.sha256(image).digest()[:8] for image in images.numpy())
    return torch.tensor([int.from_bytes(digest, signed=True) for digest in digests], dtype=torch.int64)
