"""Prepared data as tables that expectations can be put on: one row per image, per class, and one for the whole."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from d2r_core.data import Split, content_hash

_CHUNK = 4096  # images whose squared pixels are in memory at once


def images(splits: Mapping[str, Split], classes: list[str]) -> pd.DataFrame:
    """One row per image.

    Columns: image ("train[5] cat"), split, index, label, class, height, width, channels; minimum, maximum, mean and std
    of its pixels (0 .. 255); sha256 of its pixels; shared_with (the first image with the same pixels, if that stands in
    an earlier split; else null).
    """
    table = pd.concat([_split(name, split, classes) for name, split in splits.items()], ignore_index=True)
    first = table.drop_duplicates("sha256").set_index("sha256").loc[table["sha256"]]
    shared = first["split"].to_numpy() != table["split"].to_numpy()
    table["shared_with"] = first["image"].where(shared).to_numpy()
    return table


def _split(name: str, split: Split, classes: list[str]) -> pd.DataFrame:
    labels = split.labels.tolist()
    names = [classes[label] if 0 <= label < len(classes) else f"label {label}" for label in labels]
    _, channels, height, width = split.images.shape
    return pd.DataFrame(
        {
            "image": [f"{name}[{index}] {label}" for index, label in enumerate(names)],
            "split": name,
            "index": range(len(split)),
            "label": labels,
            "class": names,
            "height": height,
            "width": width,
            "channels": channels,
            **_statistics(split.images),
            "sha256": [hashlib.sha256(image.tobytes()).hexdigest() for image in split.images.numpy()],
        }
    )


def _statistics(pixels: Tensor) -> dict[str, Any]:
    """Of each image. The sums are whole numbers, so that a constant image has a standard deviation of exactly 0."""
    parts = [_chunk_statistics(chunk) for chunk in pixels.flatten(1).split(_CHUNK)]
    minimum, maximum, mean, std = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return {"minimum": minimum, "maximum": maximum, "mean": mean, "std": std}


def _chunk_statistics(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, total, squares = pixels.shape[1], pixels.sum(1), pixels.int().square_().sum(1)
    std = (count * squares - total**2).double().sqrt() / count
    return pixels.amin(1).long(), pixels.amax(1).long(), total.double() / count, std


def classes(table: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """One row per split and class, also of those without an image, from the table of images.

    Columns: group ("train: cat"), images, manifest_images, imbalance (images of the largest class / of this one, in the
    training split; null elsewhere and for a class without images).
    """
    rows = []
    for split, expected in manifest["splits"].items():
        labels = table.loc[table["split"] == split, "label"]
        counts = [int((labels == label).sum()) for label in range(len(manifest["classes"]))]
        for name, count, listed in zip(manifest["classes"], counts, expected["per_class"], strict=True):
            imbalance = max(counts) / count if split == "train" and count else None
            rows.append((f"{split}: {name}", count, listed, imbalance))
    return pd.DataFrame(rows, columns=["group", "images", "manifest_images", "imbalance"])


def dataset(splits: Mapping[str, Split], manifest: Mapping[str, Any]) -> pd.DataFrame:
    """One row: hash of the content and manifest_hash, what the manifest says it is."""
    return pd.DataFrame({"data": ["prepared"], "hash": [content_hash(splits)], "manifest_hash": [manifest["hash"]]})
