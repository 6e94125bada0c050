"""Test images for an external checkpoint: prepared ones, or the test images of any source."""

import json
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from d2r_core.data import Split, content_hash, load_split
from d2r_core.errors import UserError
from tasks.config.settings import Prepare
from tasks.data import image_folder, parallel_decoding, sources
from tasks.data.samples import Source

_SIZES = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64}  # pixels


class EvaluationImages(NamedTuple):
    split: Split
    classes: list[str]
    source: str  # name of the source, for records
    hash: str  # content_hash


def load(path: Path, prepare: Prepare, source: str | None = None, classes: int | None = None) -> EvaluationImages:
    """The test images at `path`, in an order that depends only on their names.

    Args:
        path: a folder that `prepare` wrote, a `.safetensors` file of uint8 `images` and int64 `labels`, or, if `source`
            is given, raw images as `prepare` reads them. An image folder without a test split is used as a whole.
        source: one of the values of `prepare.source`.
        classes: number of classes of a `.safetensors` file, if it has no image of the last class.

    Raises:
        UserError: `path` is neither of these, or an image cannot be decoded.
    """
    if source:
        split, names = _decoded(path, prepare, source)
        return EvaluationImages(split, names, source, content_hash({"test": split}))
    if path.suffix == ".safetensors":
        split = load_split(path)
        names = [str(label) for label in range(classes or int(split.labels.max()) + 1)]
        return EvaluationImages(split, names, path.name, content_hash({"test": split}))
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: is neither a folder of prepared data (manifest.json, test.safetensors) nor a .safetensors file "
            "of images and labels. For raw images, give their source: --source image_folder, cifar10, cifar100 or "
            "tiny_imagenet."
        ) from None
    return EvaluationImages(
        load_split(path / "test.safetensors"), manifest["classes"], manifest["source"], manifest["hash"]
    )


def _decoded(path: Path, prepare: Prepare, source: str) -> tuple[Split, list[str]]:
    with _open_source(path, prepare, source) as opened:
        with opened.test[0].open() as image:
            size = _SIZES.get(source, image.height)
        with closing(parallel_decoding.decode_in_order(opened.test, size, parallel_decoding.THREADS)) as decoded:
            pixels = []
            for sample, image_or_reason in zip(opened.test, decoded, strict=True):
                if isinstance(image_or_reason, str):
                    raise UserError(f"{sample.name}: {image_or_reason}. Remove or replace it.")
                if "resized" in image_or_reason.changes:
                    raise UserError(
                        f"{sample.name}: is {image_or_reason.original}, not {size} x {size}. All images must have the "
                        "same size."
                    )
                pixels.append(torch.from_numpy(image_or_reason.pixels))
        labels = torch.tensor([sample.label for sample in opened.test])
        return Split(torch.stack(pixels), labels), opened.classes


def _open_source(path: Path, prepare: Prepare, source: str) -> AbstractContextManager[Source]:
    if source == "image_folder":
        return image_folder.open_for_evaluation(path)
    updated = prepare.model_copy(update={"source": source, "path": str(path.absolute())})
    return sources.open_source(updated, Path(), np.random.default_rng(0))
