"""Drift: how far class shares and pixel statistics differ from those of the previously accepted data.

data/baseline.json records, for each source, the accepted data and those accepted before them, so that validating the
same data again compares them with the same predecessor and gives the same findings. The file is not a DVC out, since
DVC deletes outs before a stage runs. Without it, nothing is compared.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from d2r_core.data import Split
from d2r_core.errors import UserError
from d2r_core.files import write_text

_CHUNK = 256  # images whose squared pixels are in memory at once
_CHANNELS = ("red", "green", "blue")
_MAX_CLASSES = 3  # listed in a row

Profile = dict[str, Any]


def profile(splits: Mapping[str, Split], manifest: Mapping[str, Any]) -> Profile:
    """What later data are compared with: the hash, and per split the class shares and channel means and stds.

    Shares are in [0, 1], pixels in 0 .. 255; labels that are not a class are ignored.
    """
    return {
        "hash": manifest["hash"],
        "splits": {name: _split(split, manifest["classes"]) for name, split in splits.items() if len(split)},
    }


def _split(split: Split, classes: list[str]) -> dict[str, Any]:
    known = split.labels[(split.labels >= 0) & (split.labels < len(classes))]
    shares = (known.bincount(minlength=len(classes)).double() / max(1, len(known))).tolist()
    total = squares = torch.zeros(3, dtype=torch.int64)
    for chunk in split.images.split(_CHUNK):
        total = total + chunk.sum((0, 2, 3))
        squares = squares + chunk.int().square_().sum((0, 2, 3))
    count = split.images[:, 0].numel()
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_(min=0).sqrt()
    channels = zip(_CHANNELS, mean.tolist(), std.tolist(), strict=True)
    return {
        "shares": dict(zip(classes, shares, strict=True)),
        "pixels": {name: {"mean": round(mean, 6), "std": round(std, 6)} for name, mean, std in channels},
    }


def predecessor(path: Path, source: str, data_hash: str) -> Profile | None:
    """The profile of the data of this source that were accepted before the data with this hash, or None.

    Raises:
        UserError: the file is damaged.
    """
    slots = _read(path).get(source)
    if slots is None:
        return None
    previous: Profile | None = slots["before" if slots["accepted"]["hash"] == data_hash else "accepted"]
    return previous


def accept(path: Path, source: str, accepted: Profile) -> None:
    """Record accepted data; nothing is written if they are the last accepted ones already."""
    baselines = _read(path)
    before = baselines[source]["accepted"] if source in baselines else None
    if before is None or before["hash"] != accepted["hash"]:
        baselines[source] = {"accepted": accepted, "before": before}
        write_text(path, json.dumps(baselines, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = all(slots["accepted"]["splits"] and {"before"} <= set(slots) for slots in content.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise UserError(
            f"{path}: is not a valid record of the last accepted data. Restore it from git, or remove it to skip the "
            "next comparison."
        )
    return content


def table(now: Profile, before: Profile) -> pd.DataFrame:
    """One row per split and figure.

    Columns: figure (its name, old and new value), pixel_drift (change of a channel's mean or standard deviation, in
    accepted standard deviations), class_drift (total variation distance of the class shares, in [0, 1]: the share of
    images that would have to change their class); one of the two is null.
    """
    rows: list[tuple[str, float | None, float | None]] = []
    for name in [name for name in now["splits"] if name in before["splits"]]:
        new, old = now["splits"][name], before["splits"][name]
        for channel in _CHANNELS:
            unit = max(1.0, old["pixels"][channel]["std"])
            for figure in ("mean", "std"):
                earlier, later = old["pixels"][channel][figure], new["pixels"][channel][figure]
                change = f"{name}: {figure} of {channel} {earlier:.1f} -> {later:.1f}"
                rows.append((change, abs(later - earlier) / unit, None))
        changes = {
            label: (old["shares"].get(label, 0.0), new["shares"].get(label, 0.0))
            for label in old["shares"] | new["shares"]
        }
        most = sorted(changes, key=lambda label: -abs(changes[label][0] - changes[label][1]))[:_MAX_CLASSES]
        largest = ", ".join(f"{label} {changes[label][0]:.1%} -> {changes[label][1]:.1%}" for label in most)
        drift = sum(abs(earlier - later) for earlier, later in changes.values()) / 2
        rows.append((f"{name}: class shares, most {largest}", None, drift))
    frame = pd.DataFrame(rows, columns=["figure", "pixel_drift", "class_drift"])
    return frame.astype({"pixel_drift": float, "class_drift": float}).round(4)
