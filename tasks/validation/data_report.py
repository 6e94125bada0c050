"""The page `reports/data.html`: what the prepared data look like, and what the validation found. It stands alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from d2r_core.data import Split
from tasks.reporting import rendering
from tasks.validation.great_expectations_runner import Finding

_CLASSES = 500  # that are shown with their images; the table of counts has all
_SAMPLES = 1000  # images shown of all classes together; at least one of each
_SAMPLES_OF_A_CLASS = 12
_LOSSLESS_SIDE = 32  # pixels; a smaller image is shown exactly as it is
_SIDE = 64  # pixels; a larger one is reduced to this
_SET_ASIDE = 100  # entries of the quarantine that are listed
_CHUNK = 256  # images in floating point at once
_TWINS = ("shared_with", "looks_like", "repeats")  # values that are the name of another image


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
        images: one row for each image of the splits, in their order (tasks/validation/tables.py).
        drift: against the data accepted before (tasks/validation/drift.py); None if there were none.
        stops: whether the findings stop the chain.
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
        "quarantine": quarantine[:_SET_ASIDE],
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
    """The first classes: counts in each split, share and mean of the training images, and samples of them."""
    names = manifest["classes"]
    of_class = images[images["split"] == "train"].groupby("label").indices
    most = max(1, int(counts.max()))
    samples = max(1, min(_SAMPLES_OF_A_CLASS, _SAMPLES // len(names)))
    rows = []
    for label, name in enumerate(names[:_CLASSES]):
        members = of_class.get(label, [])
        chosen = torch.linspace(0, max(0, len(members) - 1), min(samples, len(members))).long().tolist()
        rows.append(
            {
                "name": name,
                "counts": {split: listed["per_class"][label] for split, listed in manifest["splits"].items()},
                "share": int(counts[label]) / max(1, int(counts.sum())),
                "bar": int(counts[label]) / most,
                "mean": _mean(sums[label], int(counts[label])),
                "samples": [_picture(splits["train"].images[members[position]]) for position in chosen],
            }
        )
    return rows


def _means(splits: Mapping[str, Split], classes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each split: sums of the thumbnails of every class (C, 3, side, side), and how many there are (C,)."""
    sums, counts = {}, {}
    for name, split in splits.items():
        known = (split.labels >= 0) & (split.labels < classes)
        side = min(_LOSSLESS_SIDE, *split.images.shape[2:])
        total = torch.zeros(classes, 3, side, side, dtype=torch.float64)
        for chunk, labels, kept in zip(
            split.images.split(_CHUNK), split.labels.split(_CHUNK), known.split(_CHUNK), strict=True
        ):
            small = F.adaptive_avg_pool2d(chunk[kept].float(), side).double()
            total.index_add_(0, labels[kept], small)
        sums[name], counts[name] = total, split.labels[known].bincount(minlength=classes)
    return sums, counts


def _mean(total: Tensor, count: int) -> str | None:
    """The mean of `count` images (3, H, W) whose sum is `total`; None if there are none."""
    return _picture((total / count).round().byte()) if count else None


def _offenders(finding: Finding, images: pd.DataFrame, splits: Mapping[str, Split]) -> list[dict[str, Any]]:
    """What a finding names, each with its image and, if it is about two, the other one."""
    rows = []
    for offender in finding.offenders:
        twins = [value for key, value in offender.values.items() if key in _TWINS]
        twins += [offender.values[key].rpartition(" (")[0] for key in ("also_labelled",) if key in offender.values]
        pictures = [found for name in (offender.name, *twins) if (found := _find(name, images, splits))]
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
    """A data URI of an image uint8 (3, H, W), reduced if it is large."""
    height, width = image.shape[1:]
    if max(height, width) > _SIDE:
        image = F.adaptive_avg_pool2d(image.float(), _SIDE).round().byte()
    lossless = max(height, width) <= _LOSSLESS_SIDE
    return rendering.picture(image.numpy(), "WEBP", lossless=lossless, quality=80)
