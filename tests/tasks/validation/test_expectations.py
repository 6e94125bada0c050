"""The expectations: their documentation, and the findings about repeats, labels, quarantine and names."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from project import ROOT
from validation_inputs import find, make_pictures, picture_limits, prepare_pictures

from d2r_core.errors import UserError
from tasks import validate
from tasks.config.paths import Paths
from tasks.validation import suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pictures(tmp_path)


def test_repeats_and_label_conflicts_are_distinguished(folder: Path) -> None:
    shutil.copy(folder / "train/cat/00.png", folder / "train/cat/99.png")
    shutil.copy(folder / "test/cat/01.png", folder / "test/dog/99.png")
    with pytest.raises(UserError) as raised:
        validate.run(picture_limits(), prepare_pictures(folder.parent))
    message = str(raised.value)
    assert f"{folder}/test/cat/01.png (also_labelled {folder}/test/dog/99.png (dog))" in message
    assert f"{folder}/test/dog/99.png (also_labelled {folder}/test/cat/01.png (cat))" in message
    assert message.index("one label for the same pixels") < message.index("no image twice in a split"), "errors first"
    page = Paths(folder.parent).data_page.read_text(encoding="utf-8")
    assert f'alt="{folder}/test/dog/99.png (test, dog)"' in page


def test_the_quarantine_is_a_warning_with_its_reasons(folder: Path) -> None:
    paths = prepare_pictures(folder.parent)
    entry = {"name": "photos/train/cat/<b>.png", "split": "train", "class": "cat", "reason": "cannot identify it"}
    paths.quarantine.write_text(json.dumps([entry]))
    finding = find(validate.run(picture_limits(), paths), "no quarantined image")
    assert (finding.ok, finding.severity, finding.observed) == (False, "warning", "1 of 19 fail")
    assert str(finding.offenders[0]) == "photos/train/cat/<b>.png (train, cat) (reason cannot identify it)"
    page = paths.data_page.read_text(encoding="utf-8")
    assert "photos/train/cat/&lt;b&gt;.png" in page
    assert "<b>.png" not in page


def test_names_of_other_data_are_refused(folder: Path) -> None:
    paths = prepare_pictures(folder.parent)
    paths.names.write_text('{"train": []}')
    with pytest.raises(UserError, match=r"names\.json: does not match the prepared images"):
        validate.run(picture_limits(), paths)


def test_every_expectation_is_documented() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    manifest = {"splits": {"train": {"images": 1}}, "classes": ["cat", "dog"], "image_size": 8, "channels": 3}
    frames = {name: pd.DataFrame() for name in ("images", "classes", "files", "dataset", "drift")}
    by_table = suite.expectations(frames, manifest, picture_limits().validate_)
    names = {expectation.what for expectations in by_table.values() for expectation in expectations}
    # One row for three similar ones.
    expected = {re.sub("^(height|width|channels)", "height, width, channels", name) for name in names}
    assert set(re.findall(r"^\| ([^|]+) \| (?:error|warning) \|", text, flags=re.MULTILINE)) == expected
