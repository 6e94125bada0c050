"""The images that a model from elsewhere is tested on: prepared ones, or the test images of any source."""

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


class Heldout(NamedTuple):
    split: Split
    classes: list[str]
    source: str  # what they are, for the records
    hash: str


def load(path: Path, prepare: Prepare, source: str | None = None, classes: int | None = None) -> Heldout:
    """The test images at `path`, in an order that depends on nothing but their names.

    Args:
        path: a folder that `prepare` wrote, a `.safetensors` file of uint8 `images` and int64 `labels`, or with
            `source` what `prepare` takes of that kind. Of an image folder without a test split all images are taken.
        classes: how many there are, if a `.safetensors` file does not hold an image of the last one.

    Raises:
        UserError: there is nothing of the kind, or an image cannot be used.
    """
    if source:
        split, names = _decoded(path, prepare, source)
        return Heldout(split, names, source, content_hash({"test": split}))
    if path.suffix == ".safetensors":
        split = load_split(path)
        names = [str(label) for label in range(classes or int(split.labels.max()) + 1)]
        return Heldout(split, names, path.name, content_hash({"test": split}))
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: is not a folder of prepared data (manifest.json, test.safetensors) nor a .safetensors file of "
            "images and labels. For raw images say what they are: --source image_folder, cifar10, cifar100 or "
            "tiny_imagenet."
        ) from None
    return Heldout(load_split(path / "test.safetensors"), manifest["classes"], manifest["source"], manifest["hash"])


def _decoded(path: Path, prepare: Prepare, source: str) -> tuple[Split, list[str]]:
    with _opened(path, prepare, source) as found:
        with found.test[0].open() as image:
            size = _SIZES.get(source, image.height)
        with closing(parallel_decoding.in_order(found.test, size, parallel_decoding.THREADS)) as outcomes:
            pixels = []
            for sample, outcome in zip(found.test, outcomes, strict=True):
                if isinstance(outcome, str):
                    raise UserError(f"{sample.name}: {outcome}. Remove it or replace it.")
                if "resized" in outcome.changes:
                    raise UserError(f"{sample.name}: is {outcome.found}, not {size} x {size}. All must have one size.")
                pixels.append(torch.from_numpy(outcome.pixels))
        labels = torch.tensor([sample.label for sample in found.test])
        return Split(torch.stack(pixels), labels), found.classes


def _opened(path: Path, prepare: Prepare, source: str) -> AbstractContextManager[Source]:
    if source == "image_folder":
        return image_folder.opened_for_testing(path)
    chosen = prepare.model_copy(update={"source": source, "path": str(path.absolute())})
    return sources.opened(chosen, Path(), np.random.default_rng(0))
