"""Stage prepare through its public face: images in, three files and a manifest out, all or none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from photos import PROJECT, load, make_folder, pack, photo, settings, snapshot
from PIL import Image

from d2r_core.data import content_hash
from tasks import images, prepare
from tasks.paths import Paths

FILES = ("manifest.json", "test.safetensors", "train.safetensors", "validation.safetensors")


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = Paths(tmp_path)
    manifest = prepare.run(settings(source="digits", path="unused"), paths)
    splits = load(paths)
    assert sorted(file.name for file in paths.prepared.iterdir()) == list(FILES)
    assert json.loads(paths.manifest.read_text(encoding="utf-8")) == manifest
    assert manifest["source"] == "digits"
    assert manifest["path"] is None
    assert manifest["classes"] == list("0123456789")
    assert manifest["hash"] == content_hash(splits)
    assert manifest["converted"] == {"grey": 1797, "other_mode": 0, "resized": 1797}
    assert sum(len(split) for split in splits.values()) == 1797
    for name, split in splits.items():
        assert split.images.shape == (len(split), 3, 16, 16)
        assert split.images.min() == 0
        assert split.images.max() == 255
        assert manifest["splits"][name]["per_class"] == split.labels.bincount(minlength=10).tolist()
        assert manifest["splits"][name]["images"] == len(split)
    per_class = {name: np.array(split["per_class"]) for name, split in manifest["splits"].items()}
    together = sum(per_class.values())
    assert np.abs(per_class["test"] / together - 0.2).max() < 0.01
    assert np.abs(per_class["validation"] / (together - per_class["test"]) - 0.1).max() < 0.01
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert "1797 grey" in output.out


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        prepare.run(settings(seed=seed, source="digits"), Paths(tmp_path / name))
        runs[name] = snapshot(tmp_path / name)
    assert runs["first"] == runs["again"]
    for file in FILES:
        assert runs["first"][f"data/prepared/{file}"] != runs["other"][f"data/prepared/{file}"]


def test_validation_is_cut_from_the_training_images_of_each_class(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=10)
    manifest = prepare.run(settings(validation_fraction=0.2), Paths(tmp_path))
    assert manifest["classes"] == ["cat", "dog"]
    assert {name: split["per_class"] for name, split in manifest["splits"].items()} == {
        "train": [8, 8],
        "validation": [2, 2],
        "test": [3, 3],
    }
    splits = load(Paths(tmp_path))
    for name, classes in (("train", ("train", "validation")), ("test", ("test",))):
        files = [np.asarray(Image.open(file)).tobytes() for file in (folder / name).rglob("*.png")]
        stored = [
            image.permute(1, 2, 0).contiguous().numpy().tobytes() for part in classes for image in splits[part].images
        ]
        assert sorted(files) == sorted(stored)


def test_limits_keep_a_seeded_choice_of_each_class(tmp_path: Path) -> None:
    make_folder(tmp_path, train=10, test=4)
    limited: dict[str, Any] = {"validation_fraction": 0.2, "train_per_class": 3, "test_per_class": 2}
    manifest = prepare.run(settings(**limited), Paths(tmp_path))
    assert [manifest["splits"][name]["per_class"] for name in ("train", "validation", "test")] == [
        [3, 3],
        [2, 2],
        [2, 2],
    ]
    assert prepare.run(settings(**limited), Paths(tmp_path))["hash"] == manifest["hash"]
    assert prepare.run(settings(seed=1, **limited), Paths(tmp_path))["hash"] != manifest["hash"]
    generous = prepare.run(settings(train_per_class=1000, test_per_class=1000), Paths(tmp_path))
    assert generous == prepare.run(settings(), Paths(tmp_path))


def test_a_folder_a_zip_and_several_zips_give_the_same_data(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    pack(folder, tmp_path / "one.zip")
    pack(folder, tmp_path / "many/train-a.zip", lambda name: name.startswith("train") and name < "train/cat/03")
    pack(folder, tmp_path / "many/train-b.ZIP", lambda name: name.startswith("train") and name >= "train/cat/03")
    pack(folder, tmp_path / "many/test.zip", lambda name: name.startswith("test"))
    (tmp_path / "many/README.md").write_text("three archives", encoding="utf-8")
    before = snapshot(tmp_path)
    manifests = [
        prepare.run(settings(path=str(path)), Paths(tmp_path / "out"))
        for path in (folder, tmp_path / "one.zip", tmp_path / "many")
    ]
    assert len({manifest["hash"] for manifest in manifests}) == 1
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name == "out" or name.startswith("out/") for name in after.keys() - before.keys())


def test_what_operating_systems_leave_behind_is_ignored(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    expected = prepare.run(settings(), Paths(tmp_path))
    for name in (".DS_Store", "train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db", "test/dog/._00.png"):
        (folder / name).write_bytes(b"junk")
    (folder / "train/.ipynb_checkpoints").mkdir()
    assert prepare.run(settings(), Paths(tmp_path)) == expected
    pack(folder, tmp_path / "one.zip")
    with ZipFile(tmp_path / "one.zip", "a") as archive:
        archive.writestr("__MACOSX/train/cat/._00.png", b"junk")
        archive.writestr("train/cat/", b"")
        archive.writestr("LICENSE", b"beside the splits: nobody's image")
    assert prepare.run(settings(path="one.zip"), Paths(tmp_path))["hash"] == expected["hash"]


def test_grey_transparent_and_odd_sized_images_are_converted_and_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    photo(1, "L").save(folder / "train/cat/grey.png")
    photo(2, "1").save(folder / "train/cat/black_and_white.png")
    photo(3, "LA").save(folder / "test/cat/grey_transparent.png")
    photo(4, "RGBA").save(folder / "train/cat/transparent.png")
    photo(5, "P").save(folder / "train/dog/palette.png", transparency=b"\x00\x80\xff")
    photo(6, "CMYK").save(folder / "train/dog/print.jpg")
    photo(7, size=(20, 9)).save(folder / "train/dog/odd.webp", lossless=True)
    photo(8, "L", size=(8, 8)).save(folder / "test/dog/small.bmp")
    manifest = prepare.run(settings(), Paths(tmp_path))
    assert manifest["converted"] == {"grey": 4, "other_mode": 3, "resized": 2}
    assert sum(split["images"] for split in manifest["splits"].values()) == 2 * (6 + 3) + 8


def test_conversion_keeps_what_the_picture_shows(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    Image.new("L", (40, 10), 77).save(folder / "test/cat/grey.png")
    prepare.run(settings(), Paths(tmp_path))
    assert torch.equal(load(Paths(tmp_path))["test"].images[0], torch.full((3, 16, 16), 77, dtype=torch.uint8))


@pytest.mark.parametrize("place", ["images.decode", "prepare.save_split"])
def test_an_interrupt_leaves_the_previous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    before = snapshot(tmp_path)
    module = images if place == "images.decode" else prepare
    name = place.split(".")[1]
    original = getattr(module, name)
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(settings(seed=1), Paths(tmp_path))
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes to hold the stage at one image")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_and_leaves_the_previous_files(tmp_path: Path, number: signal.Signals) -> None:
    folder = make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    before = snapshot(tmp_path / "data")
    params = json.dumps(settings(seed=1).model_dump(mode="json", by_alias=True))  # JSON is YAML
    (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
    os.mkfifo(folder / "test/dog/pipe.png")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    stage = subprocess.Popen(
        [sys.executable, "-m", "tasks.prepare"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with (folder / "test/dog/pipe.png").open("wb"):  # waits until the stage opens it too
            stage.send_signal(number)
            output, errors = stage.communicate(timeout=60)
    finally:
        stage.kill()
        stage.wait()
    assert stage.returncode == 130
    assert "Traceback" not in output + errors
    assert snapshot(tmp_path / "data") == before
