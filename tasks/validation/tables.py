"""Prepared data as tables that expectations can be put on: one row per image, class, file, and data set."""

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

    Columns: image (where it came from, from `names`), split, index, label, class, height, width, channels; minimum,
    maximum, mean and std of its pixels (0 .. 255); sha256 of its pixels. The other columns name another image, or are
    null: shared_with, the first with the same pixels, if that stands in an earlier split; repeats, the first with the
    same pixels in this split; also_labelled, one with the same pixels and another label; looks_like, one of an earlier
    split that looks the same and has other pixels.
    """
    table = pd.concat([_split(name, split, classes, names[name]) for name, split in splits.items()], ignore_index=True)
    first = table.drop_duplicates("sha256").set_index("sha256").loc[table["sha256"]]
    table["shared_with"] = first["image"].where(first["split"].to_numpy() != table["split"].to_numpy()).to_numpy()
    within = table.groupby(["split", "sha256"], sort=False)["image"].transform("first")
    table["repeats"] = within.where(table.duplicated(["split", "sha256"]))
    table["also_labelled"] = _also_labelled(table, first)
    near = near_duplicates.near([split.images for split in splits.values()])
    table["looks_like"] = table["image"].reindex(near).to_numpy()  # row -1 is none
    table.loc[table["shared_with"].notna(), "looks_like"] = None
    return table


def _split(name: str, split: Split, classes: list[str], names: Sequence[str]) -> pd.DataFrame:
    labels = split.labels.tolist()
    shown = [classes[label] if 0 <= label < len(classes) else f"label {label}" for label in labels]
    _, channels, height, width = split.images.shape
    return pd.DataFrame(
        {
            "image": pd.Series(list(names), dtype=object),
            "split": name,
            "index": range(len(split)),
            "label": labels,
            "class": pd.Series(shown, dtype=object),
            "height": height,
            "width": width,
            "channels": channels,
            **_statistics(split.images),
            "sha256": pd.Series([hashlib.sha256(image).hexdigest() for image in split.images.numpy()], dtype=object),
        }
    )


def _also_labelled(table: pd.DataFrame, first: pd.DataFrame) -> Any:
    """Of every image whose pixels carry two labels: the first one with those pixels and another label than its own."""
    labels = table.drop_duplicates(["sha256", "label"])
    second = labels[labels.duplicated("sha256")].drop_duplicates("sha256").set_index("sha256")
    names = (second["image"] + " (" + second["class"] + ")").reindex(table["sha256"]).to_numpy()
    firsts = (first["image"] + " (" + first["class"] + ")").to_numpy()
    other = np.where(first["label"].to_numpy() == table["label"].to_numpy(), names, firsts)
    return pd.Series(other).where(pd.notna(names)).to_numpy()


def _statistics(pixels: Tensor) -> dict[str, Any]:
    """Of each image. The sums are whole numbers, so that a constant image has a standard deviation of exactly 0."""
    # Filled in place: small results between large temporaries would keep the memory of these from being used again.
    found = {name: np.empty(len(pixels), dtype=np.int64) for name in ("minimum", "maximum", "total", "squares")}
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK].flatten(1)
        rows = slice(start, start + len(chunk))
        found["minimum"][rows], found["maximum"][rows] = chunk.amin(1), chunk.amax(1)
        found["total"][rows], found["squares"][rows] = chunk.sum(1), chunk.int().square_().sum(1)
    count = pixels[:1].numel()
    total, squares = found.pop("total"), found.pop("squares")
    return found | {"mean": total / count, "std": np.sqrt(count * squares - total**2) / count}


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


def files(table: pd.DataFrame, quarantine: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """One row per image of the source that was to be prepared.

    Columns: image, set_aside (why it is in the quarantine and in no split; null for the others).
    """
    prepared = pd.DataFrame({"image": table["image"], "set_aside": None})
    aside = [(f"{entry['name']} ({entry['split']}, {entry['class']})", entry["reason"]) for entry in quarantine]
    return pd.concat([pd.DataFrame(aside, columns=["image", "set_aside"], dtype=object), prepared], ignore_index=True)


def dataset(splits: Mapping[str, Split], manifest: Mapping[str, Any]) -> pd.DataFrame:
    """One row: hash of the content and manifest_hash, what the manifest says it is."""
    return pd.DataFrame({"data": ["prepared"], "hash": [content_hash(splits)], "manifest_hash": [manifest["hash"]]})
