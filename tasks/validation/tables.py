"""Prepared data as tables for expectations: one row per image, class, source file or data set."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from d2r_core.data import Split, content_hash
from tasks.validation import near_duplicates

_CHUNK = 256  # images whose squared pixels are in memory at once


def images(splits: Mapping[str, Split], classes: list[str], names: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """One row per image.

    Columns: image (its origin, from `names`), split, index, label, class, height, width, channels; minimum, maximum,
    mean and std of its pixels (0 .. 255); sha256 of its pixels. The other columns name another image, or are null:
    shared_with, the first with the same pixels, if that is in an earlier split; repeats, the first with the same pixels
    in this split; also_labelled, one with the same pixels and another label; near_duplicate_of, one of an earlier split
    that looks the same and has other pixels.
    """
    table = pd.concat([_split(name, split, classes, names[name]) for name, split in splits.items()], ignore_index=True)
    first = table.drop_duplicates("sha256").set_index("sha256").loc[table["sha256"]]
    table["shared_with"] = first["image"].where(first["split"].to_numpy() != table["split"].to_numpy()).to_numpy()
    within = table.groupby(["split", "sha256"], sort=False)["image"].transform("first")
    table["repeats"] = within.where(table.duplicated(["split", "sha256"]))
    table["also_labelled"] = _also_labelled(table, first)
    rows = near_duplicates.find_near_duplicates([split.images for split in splits.values()])
    table["near_duplicate_of"] = table["image"].reindex(rows).to_numpy()  # row -1: none
    table.loc[table["shared_with"].notna(), "near_duplicate_of"] = None
    return table


def _split(name: str, split: Split, classes: list[str], names: Sequence[str]) -> pd.DataFrame:
    labels = split.labels.tolist()
    class_names = [classes[label] if 0 <= label < len(classes) else f"label {label}" for label in labels]
    _, channels, height, width = split.images.shape
    return pd.DataFrame(
        {
            "image": pd.Series(list(names), dtype=object),
            "split": name,
            "index": range(len(split)),
            "label": labels,
            "class": pd.Series(class_names, dtype=object),
            "height": height,
            "width": width,
            "channels": channels,
            **_statistics(split.images),
            "sha256": pd.Series([hashlib.sha256(image).hexdigest() for image in split.images.numpy()], dtype=object),
        }
    )


def _also_labelled(table: pd.DataFrame, first: pd.DataFrame) -> Any:
    """For every image whose pixels have two labels: the first image with these pixels and the other label."""
    labels = table.drop_duplicates(["sha256", "label"])
    second = labels[labels.duplicated("sha256")].drop_duplicates("sha256").set_index("sha256")
    names = (second["image"] + " (" + second["class"] + ")").reindex(table["sha256"]).to_numpy()
    firsts = (first["image"] + " (" + first["class"] + ")").to_numpy()
    other = np.where(first["label"].to_numpy() == table["label"].to_numpy(), names, firsts)
    return pd.Series(other).where(pd.notna(names)).to_numpy()


def _statistics(pixels: Tensor) -> dict[str, Any]:
    """Per image. The sums are integers, so that the standard deviation of a constant image is exactly 0."""
    # Preallocated: small results allocated between large temporaries would fragment the memory of these.
    sums = {name: np.empty(len(pixels), dtype=np.int64) for name in ("minimum", "maximum", "total", "squares")}
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK].flatten(1)
        rows = slice(start, start + len(chunk))
        sums["minimum"][rows], sums["maximum"][rows] = chunk.amin(1), chunk.amax(1)
        sums["total"][rows], sums["squares"][rows] = chunk.sum(1), chunk.int().square_().sum(1)
    count = pixels[:1].numel()
    total, squares = sums.pop("total"), sums.pop("squares")
    return sums | {"mean": total / count, "std": np.sqrt(count * squares - total**2) / count}


def classes(table: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """One row per split and class, including classes without images, from the table of images.

    Columns: group ("train: cat"), images, manifest_images, imbalance (images of the largest class / of this class, for
    the training split; null for other splits and for a class without images).
    """
    rows = []
    for split, expected in manifest["splits"].items():
        labels = table.loc[table["split"] == split, "label"]
        counts = [int((labels == label).sum()) for label in range(len(manifest["classes"]))]
        for name, count, listed in zip(manifest["classes"], counts, expected["per_class"], strict=True):
            imbalance = max(counts) / count if split == "train" and count else None
            rows.append((f"{split}: {name}", count, listed, imbalance))
    return pd.DataFrame(rows, columns=["group", "images", "manifest_images", "imbalance"])


def files(table: pd.DataFrame, quarantine: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """One row per selected image of the source.

    Columns: image, reason (why it is quarantined and in no split; null for prepared images).
    """
    prepared = pd.DataFrame({"image": table["image"], "reason": None})
    quarantined = [(f"{entry['name']} ({entry['split']}, {entry['class']})", entry["reason"]) for entry in quarantine]
    return pd.concat(
        [pd.DataFrame(quarantined, columns=["image", "reason"], dtype=object), prepared], ignore_index=True
    )


def dataset(splits: Mapping[str, Split], manifest: Mapping[str, Any]) -> pd.DataFrame:
    """One row: hash of the content, and manifest_hash, the hash in the manifest."""
    return pd.DataFrame({"data": ["prepared"], "hash": [content_hash(splits)], "manifest_hash": [manifest["hash"]]})
