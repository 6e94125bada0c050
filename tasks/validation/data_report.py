"""The page `reports/data.html`: the prepared data and the findings of the validation, in one self-contained file."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from d2r_core.data import Split
from tasks.reporting import rendering
from tasks.validation.great_expectations_runner import Finding

_MAX_CLASSES = 500  # shown with images
_SAMPLES = 1000  # sample images of all classes together; at least one per class
_SAMPLES_PER_CLASS = 12
_LOSSLESS_SIDE = 32  # pixels; images up to this size are stored losslessly
_SIDE = 64  # pixels; larger images are reduced to this
_MAX_QUARANTINED = 100  # listed entries of the quarantine
_CHUNK = 256  # images in floating point at once
_OTHER_IMAGE = ("shared_with", "near_duplicate_of", "repeats")  # columns that hold the name of another image


class Picture(NamedTuple):
    source: str  # data URI
    label: str
    name: str


def render(
    splits: Mapping[str, Split],
    images: pd.DataFrame,
    manifest: Mapping[str, Any],
    findings: Sequence[Finding],
    drift: pd.DataFrame | None,
    quarantine: Sequence[Mapping[str, str]],
    *,
    stops: bool,
) -> str:
    """The page as HTML; the same data and findings give the same text.

    Its size does not grow with the number of images: about 1,000 thumbnails and the first offenders of each finding.

    Args:
        images: one row per image of the splits, in their order (tasks/validation/tables.py).
        drift: relative to the previously accepted data (tasks/validation/drift.py); None if there are none.
        stops: whether the findings stop the pipeline.
    """
    shown = sorted(
        (finding for finding in findings if finding.offenders or not finding.ok),
        key=lambda finding: (finding.ok, finding.severity),
    )
    means, counts = _means(splits, len(manifest["classes"]))
    context = {
        "manifest": manifest,
        "images": len(images),
        "findings": findings,
        "failed": [finding for finding in findings if not finding.ok],
        "shown": shown,
        "stops": stops,
        "offenders": {finding.what: _offenders(finding, images, splits) for finding in shown},
        "drift": None if drift is None else drift.to_dict("records"),
        "quarantine": quarantine[:_MAX_QUARANTINED],
        "set_aside": len(quarantine),
        "splits": [
            {"name": name, "images": len(split), "mean": _mean(means[name].sum(0), int(counts[name].sum()))}
            for name, split in splits.items()
        ],
        "classes": _classes(splits, images, manifest, means["train"], counts["train"]),
    }
    return rendering.render("data.html.j2", context)


def _classes(
    splits: Mapping[str, Split], images: pd.DataFrame, manifest: Mapping[str, Any], sums: Tensor, counts: Tensor
) -> list[dict[str, Any]]:
    """The first classes: counts per split, share and mean of the training images, and sample images."""
    names = manifest["classes"]
    rows_by_label = images[images["split"] == "train"].groupby("label").indices
    largest = max(1, int(counts.max()))
    samples = max(1, min(_SAMPLES_PER_CLASS, _SAMPLES // len(names)))
    rows = []
    for label, name in enumerate(names[:_MAX_CLASSES]):
        members = rows_by_label.get(label, [])
        selected = torch.linspace(0, max(0, len(members) - 1), min(samples, len(members))).long().tolist()
        rows.append(
            {
                "name": name,
                "counts": {split: listed["per_class"][label] for split, listed in manifest["splits"].items()},
                "share": int(counts[label]) / max(1, int(counts.sum())),
                "bar": int(counts[label]) / largest,
                "mean": _mean(sums[label], int(counts[label])),
                "samples": [_picture(splits["train"].images[members[position]]) for position in selected],
            }
        )
    return rows


def _means(splits: Mapping[str, Split], classes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each split: the sum of the thumbnails of every class (C, 3, side, side), and their number (C,)."""
    sums, counts = {}, {}
    for name, split in splits.items():
        in_range = (split.labels >= 0) & (split.labels < classes)
        side = min(_LOSSLESS_SIDE, *split.images.shape[2:])
        total = torch.zeros(classes, 3, side, side, dtype=torch.float64)
        for chunk, labels, valid in zip(
            split.images.split(_CHUNK), split.labels.split(_CHUNK), in_range.split(_CHUNK), strict=True
        ):
            small = F.adaptive_avg_pool2d(chunk[valid].float(), side).double()
            total.index_add_(0, labels[valid], small)
        sums[name], counts[name] = total, split.labels[in_range].bincount(minlength=classes)
    return sums, counts


def _mean(total: Tensor, count: int) -> str | None:
    """A picture of the mean of `count` images (3, H, W) whose sum is `total`; None if `count` is 0."""
    return _picture((total / count).round().byte()) if count else None


def _offenders(finding: Finding, images: pd.DataFrame, splits: Mapping[str, Split]) -> list[dict[str, Any]]:
    """The offenders of a finding with their images and, if there is another image involved, that image too."""
    rows = []
    for offender in finding.listed:
        others = [value for key, value in offender.values.items() if key in _OTHER_IMAGE]
        others += [offender.values[key].rpartition(" (")[0] for key in ("also_labelled",) if key in offender.values]
        pictures = [picture for name in (offender.name, *others) if (picture := _find(name, images, splits))]
        rows.append(
            {
                "name": offender.name,
                "details": list(offender.values.items()),
                "pictures": pictures,
                "labels": [picture.label for picture in pictures],
            }
        )
    return rows


def _find(name: str, images: pd.DataFrame, splits: Mapping[str, Split]) -> Picture | None:
    rows = images[images["image"] == name]
    if rows.empty:
        return None
    row = rows.iloc[0]
    return Picture(_picture(splits[row["split"]].images[row["index"]]), f"{row['split']}, {row['class']}", name)


def _picture(image: Tensor) -> str:
    """An image uint8 (3, H, W) as a data URI, reduced if it is large."""
    height, width = image.shape[1:]
    if max(height, width) > _SIDE:
        image = F.adaptive_avg_pool2d(image.float(), _SIDE).round().byte()
    lossless = max(height, width) <= _LOSSLESS_SIDE
    return rendering.picture(image.numpy(), "WEBP", lossless=lossless, quality=80)
