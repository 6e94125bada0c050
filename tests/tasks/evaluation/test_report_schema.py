"""robustness.json has one schema: what it reads it writes again, and everything else is refused with one message."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import robustness_json

from d2r_core.errors import UserError
from tasks.evaluation.report_schema import VERSION, ChampionComparison, Identity, RobustnessReport

SKIPPED = {"key": "black_box", "name": "White box beats black box", "passed": None, "found": "No black box."}
AUTOATTACK = robustness_json.figures(
    "AutoAttack standard",
    step_size=None,
    steps=None,
    restarts=None,
    stages=[{"name": "APGD-CE", "accuracy": 0.75}, {"name": "Square", "accuracy": 0.5}],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "robustness.json"


def whole() -> dict[str, Any]:
    target = robustness_json.model("7a", {"autoattack": AUTOATTACK}, (SKIPPED,))
    target["attacks"]["clean"]["per_class"] = [1e-05, None]
    content: dict[str, Any] = robustness_json.content({"target": target}, checkpoint="theirs.pt")
    return content


def test_a_report_is_written_as_it_was_read(path: Path) -> None:
    robustness_json.write(path, whole())
    report = RobustnessReport.read(path)
    assert json.loads(report.json_text()) == whole()
    autoattack = report.target.attacks["autoattack"]
    assert autoattack.attacks is not None
    assert [attack.name for attack in autoattack.attacks] == ["APGD-CE", "Square"]
    assert report.target.checks[0].message == "No black box."
    assert report.checkpoint == "theirs.pt"


def test_a_report_cannot_be_changed(path: Path) -> None:
    robustness_json.write(path, whole())
    report = RobustnessReport.read(path)
    with pytest.raises(ValueError, match="frozen"):
        report.target.attacks["pgd"].accuracy = 1.0  # type: ignore[misc]


def test_the_identity_is_weights_data_and_evaluation(path: Path) -> None:
    robustness_json.write(path, whole())
    identity = RobustnessReport.read(path).identity
    assert identity == Identity(weights_sha256="7a", data_hash="data", evaluation_hash="evaluation")
    assert identity.same_evaluation(identity.model_copy(update={"weights_sha256": "other"}))
    for key in ("data_hash", "evaluation_hash"):
        assert not identity.same_evaluation(identity.model_copy(update={key: "other"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, rf"has version {VERSION + 1}, and this release reads version {VERSION}"),
        ({"version": None}, r"has no version"),
        ({"surplus": 1}, r"surplus: Extra inputs are not permitted"),
        ({"seed": "a"}, r"seed: "),
        ({"models": {"guidance": robustness_json.model()}}, r"models: .*target is missing"),
        ({"models": {"target": robustness_json.model() | {"attacks": {}}}}, r"models\.target\.attacks: .*clean, pgd"),
    ],
)
def test_another_file_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    robustness_json.write(path, whole() | change)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*{message}.*`d2r stage evaluate`"):
        RobustnessReport.read(path)


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_missing_or_damaged_file_is_refused(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*`d2r stage evaluate`"):
        RobustnessReport.read(path)


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_damaged_comparison_is_refused(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*`d2r run`"):
        ChampionComparison.read(path)
