"""Stage validate: honest data passes, a planted fault is found and named, and the reports are there in either case."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from photos import PROJECT, load, settings, snapshot

from d2r_core.data import Split, content_hash, save_split
from d2r_core.errors import UserError
from tasks import prepare, validate
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.validation import great_expectations_runner, suite

EXPECTATIONS = 17  # without drift


def limits(**values: Any) -> Settings:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["validate"] |= {"max_near_duplicates": 1000, "max_repeated_images": 1000} | values
    return settings_file.parse(params)


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


def plant(paths: Paths, change: Callable[[dict[str, Split]], None]) -> None:
    """Change the prepared tensors, and the manifest with them, as if they had been prepared so."""
    splits = load(paths)
    change(splits)
    manifest = json.loads(paths.manifest.read_text(encoding="utf-8"))
    for name, split in splits.items():
        save_split(paths.prepared / f"{name}.safetensors", split)
        known = split.labels[(split.labels >= 0) & (split.labels < 10)]
        manifest["splits"][name] = {"images": len(split), "per_class": known.bincount(minlength=10).tolist()}
    names = {name: [f"{name}[{index}]" for index in range(len(split))] for name, split in splits.items()}
    paths.names.write_text(json.dumps(names), encoding="utf-8")
    manifest["hash"] = content_hash(splits)
    paths.manifest.write_text(json.dumps(manifest), encoding="utf-8")


def written(paths: Paths) -> dict[str, Any]:
    """validation.json, after a look at what must lie beside it."""
    assert "Great Expectations" in (paths.validation / "index.html").read_text(encoding="utf-8")
    assert list((paths.validation / "validations").rglob("*.html"))
    assert "| expectation | observed | allowed |" in (paths.validation / "validation.md").read_text(encoding="utf-8")
    summary: dict[str, Any] = json.loads((paths.validation / "validation.json").read_text(encoding="utf-8"))
    assert len(summary["expectations"]) == EXPECTATIONS
    assert sorted(path.name for path in paths.reports.iterdir()) == ["data.html", "validation"]
    return summary


def test_honest_data_passes(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(paths.root)
    findings = validate.run(limits(), paths)
    assert len(findings) == EXPECTATIONS
    assert all(finding.ok for finding in findings)
    summary = written(paths)
    assert summary["success"] is True
    assert summary["images"] == sum(len(split) for split in load(paths).values())
    after = snapshot(paths.root)
    assert {name: content for name, content in after.items() if not name.startswith("reports")} == before | {
        "data/baseline.json": paths.baseline.read_bytes()
    }
    output = capsys.readouterr()
    assert f"{EXPECTATIONS} of {EXPECTATIONS} expectations hold" in output.out
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


# What is planted, and for each expectation that fails: what was observed, and the offenders that are named.
FAULTS: dict[str, tuple[Callable[[dict[str, Split]], None], dict[str, tuple[str, list[str]]]]] = {
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
    "empty": (empty, {"known labels": ("nothing", []), "every class in every split": ("30 of 30", ["train: 0"])}),
}


@pytest.mark.parametrize(("change", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_stops_the_chain_and_is_named(
    paths: Paths, change: Callable[[dict[str, Split]], None], expected: dict[str, tuple[str, list[str]]]
) -> None:
    plant(paths, change)
    with pytest.raises(UserError) as raised:
        validate.run(limits(), paths)
    summary = written(paths)
    assert summary["success"] is False
    failed = {finding["what"]: finding for finding in summary["expectations"] if not finding["ok"]}
    # Two-valued pictures of digits repeat, and nothing at all fails everywhere.
    others = {"stored_in_0_to_1": {"no image in more than one split", "one label for the same pixels"}}.get(
        change.__name__, set()
    )
    assert set(expected) <= set(failed)
    assert change is empty or set(failed) - set(expected) <= others
    message = str(raised.value)
    assert f"{len(failed)} of {EXPECTATIONS} expectations failed" in message
    assert str(paths.validation) in message
    markdown = (paths.validation / "validation.md").read_text(encoding="utf-8")
    for what, (observed, offenders) in expected.items():
        assert failed[what]["observed"].startswith(observed)
        assert what in message
        assert failed[what]["allowed"] in message
        for offender in offenders:
            assert any(found.startswith(offender) for found in failed[what]["offenders"])
            assert offender in message
            assert offender in markdown


def test_accepted_data_are_named_whatever_the_limits(paths: Paths) -> None:
    validate.run(limits(max_imbalance=1.5), paths)
    accepted = paths.accepted.read_bytes()
    assert json.loads(accepted) == {"data_hash": json.loads(paths.manifest.read_text())["hash"]}
    validate.run(limits(max_imbalance=1.6), paths)
    assert paths.accepted.read_bytes() == accepted
    with pytest.raises(UserError):
        validate.run(limits(min_images_per_class=1000), paths)
    assert not paths.accepted.exists()


def test_only_the_first_offenders_are_listed(paths: Paths) -> None:
    plant(paths, shared_images)
    with pytest.raises(UserError, match="and 3 more"):
        validate.run(limits(), paths)
    finding = next(
        found for found in written(paths)["expectations"] if found["what"] == "no image in more than one split"
    )
    assert len(finding["offenders"]) == 10
    assert finding["more"] == 3
    assert finding["offenders"][0] == "validation[0] (shared_with train[20])"


def test_so_many_shared_images_as_allowed_pass(paths: Paths) -> None:
    plant(paths, shared_images)
    validate.run(limits(max_shared_images=13, max_label_conflicts=100), paths)
    assert written(paths)["success"] is True
    with pytest.raises(UserError, match=r"13 of .* fail +at most 12"):
        validate.run(limits(max_shared_images=12, max_label_conflicts=100), paths)


def test_tensors_of_another_run_than_the_manifest_are_found(
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
    written(paths)


def test_an_expectation_that_cannot_be_computed_is_a_failure(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    original = suite.checks

    def with_an_unknown_column(*arguments: Any) -> dict[str, list[great_expectations_runner.Check]]:
        made = original(*arguments)
        expectation: Any = made["images"][1].expectation
        expectation.column = "lable"
        return made

    monkeypatch.setattr(suite, "checks", with_an_unknown_column)
    with pytest.raises(UserError, match=r'1 of 17 expectations failed[\s\S]*known labels +error: .*"lable"'):
        validate.run(limits(), paths)
    assert written(paths)["success"] is False


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
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*`dvc repro prepare` makes it\."):
        validate.run(limits(), paths)
    assert not paths.reports.exists()
