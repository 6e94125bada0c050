"""Stage `validate`: valid data pass, every planted fault is reported, and the reports are written in both cases."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import load, settings, snapshot
from validation_inputs import Change, limits, modify

from d2r_core.data import Split
from d2r_core.errors import UserError
from tasks import prepare, validate
from tasks.config.paths import Paths
from tasks.validation import suite
from tasks.validation.great_expectations_runner import Expectation

EXPECTATIONS = 17  # without drift


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    prepare.run(settings(source="digits", train_per_class=20, test_per_class=10), Paths(root))
    return root


@pytest.fixture
def paths(prepared: Path, tmp_path: Path) -> Paths:
    """A copy of the prepared digits."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return Paths(tmp_path)


def read_summary(paths: Paths) -> dict[str, Any]:
    """The content of validation.json; checks that the other reports exist."""
    assert "Great Expectations" in (paths.validation / "index.html").read_text(encoding="utf-8")
    assert list((paths.validation / "validations").rglob("*.html"))
    summary: dict[str, Any] = json.loads((paths.validation / "validation.json").read_text(encoding="utf-8"))
    assert len(summary["expectations"]) == EXPECTATIONS
    assert sorted(path.name for path in paths.reports.iterdir()) == ["data.html", "validation"]
    return summary


def test_valid_data_pass(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(paths.root)
    findings = validate.run(limits(), paths)
    assert len(findings) == EXPECTATIONS
    assert all(finding.ok for finding in findings)
    summary = read_summary(paths)
    assert summary["success"] is True
    assert summary["images"] == sum(len(split) for split in load(paths).values())
    after = snapshot(paths.root)
    assert {name: content for name, content in after.items() if not name.startswith("reports")} == before | {
        "data/baseline.json": paths.baseline.read_bytes()
    }
    output = capsys.readouterr()
    assert f"{EXPECTATIONS} of {EXPECTATIONS} expectations met" in output.out
    assert output.err == ""


def test_the_same_data_gives_the_same_reports(paths: Paths) -> None:
    validate.run(limits(), paths)
    first = snapshot(paths.root)
    validate.run(limits(), paths)
    assert snapshot(paths.root) == first


def label_out_of_range(splits: dict[str, Split]) -> None:
    splits["train"].labels[3] = 11
    splits["test"].labels[0] = -1


def class_missing(splits: dict[str, Split]) -> None:
    splits["test"] = splits["test"].take(torch.where(splits["test"].labels != 4)[0])


def few_images(splits: dict[str, Split]) -> None:
    chosen = torch.cat([torch.where(splits["test"].labels != 2)[0], torch.where(splits["test"].labels == 2)[0][:4]])
    splits["test"] = splits["test"].take(chosen)


def imbalance(splits: dict[str, Split]) -> None:
    chosen = torch.cat([torch.where(splits["train"].labels != 7)[0], torch.where(splits["train"].labels == 7)[0][:10]])
    splits["train"] = splits["train"].take(chosen)


def constant_image(splits: dict[str, Split]) -> None:
    splits["validation"].images[2] = 99


def shared_images(splits: dict[str, Split]) -> None:
    splits["test"].images[:12] = splits["train"].images[:12]
    splits["validation"].images[0] = splits["train"].images[20]


def stored_in_0_to_1(splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        splits[name] = Split((split.images > 127).to(torch.uint8), split.labels)


def smaller_test_images(splits: dict[str, Split]) -> None:
    splits["test"] = Split(splits["test"].images[:, :, :12, :15], splits["test"].labels)


def empty(splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        splits[name] = split.take(torch.tensor([], dtype=torch.int64))


# The fault, and for each expectation that fails: the start of what is observed, and offenders.
FAULTS: dict[str, tuple[Change, dict[str, tuple[str, list[str]]]]] = {
    "label_out_of_range": (
        label_out_of_range,
        {"known labels": ("2 of", ["train[3] (label 11)", "test[0] (label -1)"])},
    ),
    "class_missing": (
        class_missing,
        {
            "every class in every split": ("1 of 30", ["test: 4 (images 0)"]),
            "enough images of each class in every split": ("1 of 30", ["test: 4 (images 0)"]),
        },
    ),
    "few_images": (
        few_images,
        {"enough images of each class in every split": ("1 of 30", ["test: 2 (images 4)"])},
    ),
    "imbalance": (imbalance, {"balanced training images": ("1 of 10", ["train: 7 (imbalance 2.0)"])}),
    "constant_image": (constant_image, {"no image of one colour": ("1 of", ["validation[2] "])}),
    "shared_images": (
        shared_images,
        {
            "no image in more than one split": ("13 of", ["validation[0]", "test[0] (shared_with train[0])"]),
            "one label for the same pixels": ("", ["train[0] (also_labelled test[0] ("]),
        },
    ),
    "stored_in_0_to_1": (stored_in_0_to_1, {"pixels in the range 0 to 255": ("1", [])}),
    "smaller_test_images": (
        smaller_test_images,
        {"height as in the manifest": ("100 of", ["test[0]"]), "width as in the manifest": ("100 of", ["test[0]"])},
    ),
    "empty": (empty, {"known labels": ("no rows", []), "every class in every split": ("30 of 30", ["train: 0"])}),
}


@pytest.mark.parametrize(("change", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_stops_the_pipeline_and_is_reported(
    paths: Paths, change: Change, expected: dict[str, tuple[str, list[str]]]
) -> None:
    modify(paths, change)
    with pytest.raises(UserError) as raised:
        validate.run(limits(), paths)
    summary = read_summary(paths)
    assert summary["success"] is False
    failed = {finding["what"]: finding for finding in summary["expectations"] if not finding["ok"]}
    # Digits in black and white repeat, and empty splits violate almost every expectation.
    others = {"stored_in_0_to_1": {"no image in more than one split", "one label for the same pixels"}}.get(
        change.__name__, set()
    )
    assert set(expected) <= set(failed)
    assert change is empty or set(failed) - set(expected) <= others
    message = str(raised.value)
    assert f"{len(failed)} of {EXPECTATIONS} expectations failed" in message
    assert str(paths.validation) in message
    for what, (observed, offenders) in expected.items():
        assert failed[what]["observed"].startswith(observed)
        assert what in message
        assert failed[what]["allowed"] in message
        for offender in offenders:
            assert any(listed.startswith(offender) for listed in failed[what]["offenders"])
            assert offender in message


def test_accepted_json_depends_on_the_data_only(paths: Paths) -> None:
    validate.run(limits(max_imbalance=1.5), paths)
    accepted = paths.accepted.read_bytes()
    assert json.loads(accepted) == {"data_hash": json.loads(paths.manifest.read_text())["hash"]}
    validate.run(limits(max_imbalance=1.6), paths)
    assert paths.accepted.read_bytes() == accepted
    with pytest.raises(UserError):
        validate.run(limits(min_images_per_class=1000), paths)
    assert not paths.accepted.exists()


def test_only_the_first_offenders_are_listed(paths: Paths) -> None:
    modify(paths, shared_images)
    with pytest.raises(UserError, match="and 3 more"):
        validate.run(limits(), paths)
    finding = next(
        entry for entry in read_summary(paths)["expectations"] if entry["what"] == "no image in more than one split"
    )
    assert len(finding["offenders"]) == 10
    assert finding["more"] == 3
    assert finding["offenders"][0] == "validation[0] (shared_with train[20])"


def test_findings_csv_lists_every_offender(paths: Paths) -> None:
    def change(splits: dict[str, Split]) -> None:
        shared_images(splits)
        splits["test"].images[50] = 90

    modify(paths, change)
    quarantined = {"name": 'a, "b".png', "split": "train", "class": "3", "reason": "not an image"}
    paths.quarantine.write_text(json.dumps([quarantined]), encoding="utf-8")
    with pytest.raises(UserError, match=r"every image concerned is in .*findings\.csv"):
        validate.run(limits(max_repeated_images=0), paths)
    with (paths.validation / "findings.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    by_expectation: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_expectation.setdefault(row["expectation"], []).append(row)
    shared = by_expectation["no image in more than one split"]
    assert len(shared) == 13
    label = load(paths)["validation"].labels[0]
    assert shared[0] == {
        "expectation": "no image in more than one split",
        "failed": "True",
        "severity": "error",
        "split": "validation",
        "class": str(int(label)),
        "image": "validation[0]",
        "other_image": "train[20]",
        "details": "",
    }
    (constant,) = by_expectation["no image of one colour"]
    assert (constant["image"], constant["split"], constant["details"]) == ("test[50]", "test", "std 0.0")
    (unusable,) = by_expectation["no quarantined image"]
    assert (unusable["image"], unusable["class"], unusable["details"]) == ('a, "b".png', "3", "not an image")
    # Also what a limit allows.
    allowed = by_expectation["no near-duplicate in another split"]
    assert {row["failed"] for row in allowed} == {"False"}
    assert all(row["other_image"] for row in allowed)


def test_shared_images_up_to_the_limit_pass(paths: Paths) -> None:
    modify(paths, shared_images)
    validate.run(limits(max_shared_images=13, max_label_conflicts=100), paths)
    assert read_summary(paths)["success"] is True
    with pytest.raises(UserError, match=r"13 of .* fail +at most 12"):
        validate.run(limits(max_shared_images=12, max_label_conflicts=100), paths)


def test_tensors_that_do_not_match_the_manifest_are_reported(
    paths: Paths, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Paths(tmp_path_factory.mktemp("other"))
    prepare.run(settings(source="digits", seed=1, train_per_class=20, test_per_class=9), other)
    for file in ("test.safetensors", "names.json"):
        shutil.copy(other.prepared / file, paths.prepared)
    with pytest.raises(UserError) as raised:
        validate.run(limits(), paths)
    for what in ("as many images as in", "images of each class as in", "content as in"):
        assert f"{what} the manifest" in str(raised.value)
    read_summary(paths)


def test_an_expectation_that_cannot_be_computed_is_a_failure(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    original = suite.expectations

    def with_an_unknown_column(*arguments: Any) -> dict[str, list[Expectation]]:
        expectations = original(*arguments)
        known_labels: Any = expectations["images"][1].gx
        known_labels.column = "lable"
        return expectations

    monkeypatch.setattr(suite, "expectations", with_an_unknown_column)
    with pytest.raises(UserError, match=r'1 of 17 expectations failed[\s\S]*known labels +error: .*"lable"'):
        validate.run(limits(), paths)
    assert read_summary(paths)["success"] is False


def test_the_previous_reports_are_replaced_as_a_whole(paths: Paths) -> None:
    paths.validation.mkdir(parents=True)
    (paths.validation / "stale.txt").write_text("from an older run", encoding="utf-8")
    validate.run(limits(), paths)
    assert not (paths.validation / "stale.txt").exists()


def test_an_interrupt_leaves_the_previous_reports(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    validate.run(limits(), paths)
    before = snapshot(paths.root)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(validate, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate.run(limits(), paths)
    assert snapshot(paths.root) == before


@pytest.mark.parametrize("name", ["manifest.json", "names.json", "quarantine.json", "test.safetensors"])
@pytest.mark.parametrize("content", [None, "{half"])
def test_missing_or_damaged_files_get_one_message(paths: Paths, name: str, content: str | None) -> None:
    (paths.prepared / name).unlink()
    if content is not None:
        (paths.prepared / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*`dvc repro prepare`"):
        validate.run(limits(), paths)
    assert not paths.reports.exists()
