"""Drift: the data are compared with the previously accepted data of the same source."""

import json
import re
from pathlib import Path

import pytest
import torch
from validation_inputs import Change, find, make_pictures, modify, picture_limits, prepare_pictures

from d2r_core.data import Split
from d2r_core.errors import UserError
from tasks import validate
from tasks.config.paths import Paths
from tasks.validation import drift


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    make_pictures(tmp_path)
    return prepare_pictures(tmp_path)


def darken(splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        splits[name] = Split((split.images * 0.5).byte(), split.labels)


def remove_cats(splits: dict[str, Split]) -> None:
    train = splits["train"]
    splits["train"] = train.take(torch.cat([torch.where(train.labels == 0)[0][:2], torch.where(train.labels == 1)[0]]))


@pytest.mark.parametrize(
    ("change", "what", "offender"),
    [
        (darken, "pixels as in the last accepted data", r"train: mean of red [\d.]+ -> [\d.]+ \(pixel_drift \d\.\d+\)"),
        (remove_cats, "class shares as in the last accepted data", r"train: class shares, most cat 50\.0% -> \d+\.\d%"),
    ],
)
def test_drift_against_the_last_accepted_data(paths: Paths, change: Change, what: str, offender: str) -> None:
    first = validate.run(picture_limits(max_imbalance=9.0), paths)
    assert not [finding for finding in first if "last accepted" in finding.what], "there is nothing to compare with"
    old = json.loads(paths.manifest.read_text())["hash"]
    modify(paths, change)
    finding = find(validate.run(picture_limits(max_imbalance=9.0), paths), what)
    assert (finding.ok, finding.severity) == (False, "warning")
    assert re.search(offender, " ".join(map(str, finding.offenders)))
    report = paths.validation / "validation.json"
    assert json.loads(report.read_text())["compared_with"] == old
    written = report.read_bytes(), paths.baseline.read_bytes()
    validate.run(picture_limits(max_imbalance=9.0), paths)
    assert (report.read_bytes(), paths.baseline.read_bytes()) == written, "the same data, the same predecessor"


def test_rejected_data_are_no_baseline_and_a_damaged_baseline_is_one_message(paths: Paths) -> None:
    with pytest.raises(UserError):
        validate.run(picture_limits(min_images_per_class=50), paths)
    assert not paths.baseline.exists()
    for content in ("{half", "[]", '{"image_folder": {"accepted": 1}}'):
        paths.baseline.write_text(content)
        with pytest.raises(UserError, match=r"baseline\.json: .* Restore it from git, or remove it"):
            validate.run(picture_limits(), paths)


def test_each_source_has_its_own_baseline(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    one, two, three = ({"hash": name, "splits": {"train": name}} for name in ("1", "2", "3"))
    drift.accept(path, "digits", one)
    drift.accept(path, "cifar10", two)
    assert drift.predecessor(path, "digits", "1") is None
    drift.accept(path, "digits", three)
    assert drift.predecessor(path, "digits", "3") == one
    assert drift.predecessor(path, "digits", "4") == three
    assert drift.predecessor(path, "cifar10", "4") == two
