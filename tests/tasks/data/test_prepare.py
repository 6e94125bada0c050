"""Stage `prepare`: from images to three files and a manifest."""

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from photos import load, make_folder, pack, photo, settings, snapshot
from PIL import ExifTags, Image
from PIL.Image import Transpose

from d2r_core.data import content_hash
from d2r_core.errors import UserError
from tasks import prepare
from tasks.config.paths import Paths
from tasks.data import image_decoding

FILES = (
    "manifest.json",
    "names.json",
    "quarantine.json",
    "test.safetensors",
    "train.safetensors",
    "validation.safetensors",
)
# How a camera that was turned stores an upright image: EXIF's orientation names the row and column that come first.
STORED: dict[int, Transpose | None] = {
    1: None,
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,  # counter-clockwise
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


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
    assert _converted(manifest) == {"grey": 1797, "resized": 1797}
    assert sum(len(split) for split in splits.values()) == 1797
    for name, split in splits.items():
        assert split.images.shape == (len(split), 3, 16, 16)
        assert split.images.min() == 0
        assert split.images.max() == 255
        assert manifest["splits"][name]["per_class"] == split.labels.bincount(minlength=10).tolist()
        assert manifest["splits"][name]["images"] == len(split)
    per_class = {name: np.array(split["per_class"]) for name, split in manifest["splits"].items()}
    total = sum(per_class.values())
    assert np.abs(per_class["test"] / total - 0.2).max() < 0.01
    assert np.abs(per_class["validation"] / (total - per_class["test"]) - 0.1).max() < 0.01
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
        if file != "quarantine.json":
            assert runs["first"][f"data/prepared/{file}"] != runs["other"][f"data/prepared/{file}"]


def test_validation_images_are_taken_from_the_training_images_of_each_class(tmp_path: Path) -> None:
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


def test_limits_select_seeded_images_of_each_class(tmp_path: Path) -> None:
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


def test_files_of_operating_systems_are_ignored(tmp_path: Path) -> None:
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
        archive.writestr("LICENSE", b"a file beside the splits, no image")
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
    expected = {"grey": 4, "other_mode": 3, "composited": 3, "resized": 2, "stretched": 1}
    assert _converted(manifest) == expected
    assert sum(split["images"] for split in manifest["splits"].values()) == 2 * (6 + 3) + 8


def test_conversion_preserves_the_content(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    Image.new("L", (40, 10), 77).save(folder / "test/cat/grey.png")
    prepare.run(settings(), Paths(tmp_path))
    assert torch.equal(load(Paths(tmp_path))["test"].images[0], torch.full((3, 16, 16), 77, dtype=torch.uint8))


def _converted(manifest: dict[str, Any]) -> dict[str, int]:
    assert list(manifest["converted"]) == list(image_decoding.CHANGES)
    return {change: count for change, count in manifest["converted"].items() if count}


@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_turned_upright_as_their_camera_says(tmp_path: Path, orientation: int) -> None:
    upright, turn = photo(1, size=(16, 16)), STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    folder = make_folder(tmp_path)
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    stored.save(folder / "test/cat/photo.png", exif=exif)
    manifest = prepare.run(settings(), Paths(tmp_path))
    expected = torch.from_numpy(np.array(upright).transpose(2, 0, 1))
    assert torch.equal(load(Paths(tmp_path))["test"].images[0], expected)
    assert manifest["converted"]["rotated"] == (orientation > 1)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    Image.new("RGBA", (16, 16), (200, 100, 0, 51)).save(folder / "test/cat/glass.png")  # 51: a fifth
    prepare.run(settings(), Paths(tmp_path))
    colour = load(Paths(tmp_path))["test"].images[0, :, 5, 5]
    assert colour.tolist() == [244, 224, 204]  # 255 - (255 - colour) / 5


@pytest.mark.parametrize(
    ("fit", "left", "middle", "change"),
    [("stretch", "red", "red", "stretched"), ("crop", "green", "green", "cropped"), ("pad", "black", "red", "padded")],
)
def test_images_that_are_not_square(tmp_path: Path, fit: str, left: str, middle: str, change: str) -> None:
    """A high image, green in its middle: stretched it is all there, cropped only its middle, padded with its edges."""
    folder = make_folder(tmp_path)
    for file in (folder / "test/cat").iterdir():
        file.unlink()
    image = Image.new("RGB", (32, 96), "red")
    image.paste("lime", (0, 32, 32, 64))
    image.save(folder / "test/cat/high.png")
    manifest = prepare.run(settings(fit=fit), Paths(tmp_path))
    pixels = load(Paths(tmp_path))["test"].images[0]
    colours = {"red": [255, 0, 0], "green": [0, 255, 0], "black": [0, 0, 0]}
    assert pixels[:, 1, 1].tolist() == colours[left]
    assert pixels[:, 1, 8].tolist() == colours[middle]
    assert manifest["converted"][change] == 1


def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=100, test=90)
    (folder / "train/cat/50.png").write_bytes(b"junk")
    runs = []
    for threads in (1, 2, 7):
        prepare.run(settings(on_bad_image="quarantine"), Paths(tmp_path), threads)
        runs.append(snapshot(tmp_path / "data"))
    assert runs[0] == runs[1] == runs[2]


def test_a_missing_test_split_is_taken_from_the_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=20)
    shutil.rmtree(folder / "test")
    half = settings(test_fraction=0.25, validation_fraction=0.2)
    manifest = prepare.run(half, Paths(tmp_path))
    assert [split["per_class"] for split in manifest["splits"].values()] == [[12, 12], [3, 3], [5, 5]]
    names = json.loads(Paths(tmp_path).names.read_text(encoding="utf-8"))
    assert len({name for split in names.values() for name in split}) == 40
    (folder / "train").rename(tmp_path / "flat")
    pack(tmp_path / "flat", tmp_path / "flat.zip")
    pack(tmp_path, tmp_path / "wrapped.zip", lambda name: name.startswith("flat/"))
    for path in ("flat", "flat.zip", "wrapped.zip"):
        again = settings(path=path, test_fraction=0.25, validation_fraction=0.2)
        assert prepare.run(again, Paths(tmp_path))["hash"] == manifest["hash"]
    other = settings(path="flat", test_fraction=0.25, validation_fraction=0.2, seed=1)
    assert prepare.run(other, Paths(tmp_path))["hash"] != manifest["hash"]


def test_the_test_fraction_is_used_only_without_a_test_split(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert prepare.run(settings(test_fraction=0.4), Paths(tmp_path)) == prepare.run(settings(), Paths(tmp_path))


def test_names_json_has_the_origin_of_every_image(tmp_path: Path) -> None:
    make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    names = json.loads(Paths(tmp_path).names.read_text(encoding="utf-8"))
    for split, loaded in load(Paths(tmp_path)).items():
        stored = [np.asarray(Image.open(name)) for name in names[split]]
        assert np.array_equal(np.stack(stored), loaded.images.permute(0, 2, 3, 1).numpy())


def test_quarantine_lists_unusable_images_and_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path)
    expected = prepare.run(settings(), Paths(tmp_path))
    assert json.loads(Paths(tmp_path).quarantine.read_text(encoding="utf-8")) == []
    capsys.readouterr()
    (folder / "test/dog/bad.png").write_bytes(b"junk")
    photo(1, "L").save(folder / "test/cat/grey.png")
    manifest = prepare.run(settings(on_bad_image="quarantine", on_mismatch="refuse"), Paths(tmp_path))
    assert manifest["hash"] == expected["hash"] == content_hash(load(Paths(tmp_path)))
    assert [split["quarantined"] for split in manifest["splits"].values()] == [0, 0, 2]
    assert [split["images"] for split in manifest["splits"].values()] == [10, 2, 6]
    expected_entries = [
        ("test/cat/grey.png", "cat", "L, 16 x 16, not RGB of 16 x 16 pixels"),
        ("test/dog/bad.png", "dog", "not an image"),
    ]
    assert json.loads(Paths(tmp_path).quarantine.read_text(encoding="utf-8")) == [
        {"name": str(folder / name), "split": "test", "class": label, "reason": reason}
        for name, label, reason in expected_entries
    ]
    assert "quarantined 2 unusable images, listed in" in capsys.readouterr().out


def test_quarantine_does_not_hide_a_split_without_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(
        UserError, match=r"photos: no image of the test split can be used, for example .*cat/00\.png \("
    ):
        prepare.run(settings(on_bad_image="quarantine"), Paths(tmp_path))
