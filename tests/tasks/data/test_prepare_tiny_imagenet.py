"""Tiny ImageNet: a small copy of the original layout, as a folder and as an archive, and the real images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from photos import load, photo, settings, snapshot
from PIL import Image
from project import ROOT, SHARED

from d2r_core.errors import UserError
from tasks import prepare
from tasks.config import settings as settings_file
from tasks.config.paths import Paths

WNIDS = ("n02", "n01", "n03")  # as in the original, not in order
REAL = SHARED / "tiny-imagenet-200-subset.zip"


def make_tree(root: Path) -> Path:
    """root/tiny-imagenet-200 with three classes; one training image is grey."""
    folder = root / "tiny-imagenet-200"
    annotations = []
    for label, wnid in enumerate(WNIDS):
        (folder / f"train/{wnid}/images").mkdir(parents=True)
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i in range(4):
            mode = "L" if (label, i) == (0, 0) else "RGB"
            photo(10 * label + i, mode, (64, 64)).save(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG")
    (folder / "val/images").mkdir(parents=True)
    for i in range(6):
        photo(100 + i, size=(64, 64)).save(folder / f"val/images/val_{i}.JPEG")
        annotations.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t63\t63\n")
    (folder / "val/val_annotations.txt").write_text("".join(annotations))
    (folder / "test/images").mkdir(parents=True)
    photo(200).save(folder / "test/images/test_0.JPEG")
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    (folder / "words.txt").write_text(
        "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane, machine\n"
    )
    return folder


def tiny(path: str = "raw", **values: object) -> settings_file.Settings:
    return settings(
        **{"source": "tiny_imagenet", "path": path, "image_size": 64, "on_mismatch": "refuse"} | values  # type: ignore[arg-type]
    )


def test_the_original_layout_as_folder_and_archive(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "raw")
    manifest = prepare.run(tiny(), Paths(tmp_path))
    assert manifest["classes"] == ["goldfish", "crane (n02)", "crane (n03)"]
    assert [split["per_class"] for split in manifest["splits"].values()] == [[3] * 3, [1] * 3, [2] * 3]
    assert {change for change, count in manifest["converted"].items() if count} == {"grey"}
    assert manifest["converted"]["grey"] == 1
    names = json.loads(Paths(tmp_path).names.read_text(encoding="utf-8"))
    assert [Path(name).name for name in names["test"]] == [f"val_{i}.JPEG" for i in range(6)]
    test = load(Paths(tmp_path))["test"]
    assert test.labels.tolist() == [1, 0, 2] * 2
    assert np.array_equal(test.images[4].permute(1, 2, 0).numpy(), np.asarray(Image.open(names["test"][4])))

    archive = shutil.make_archive(str(tmp_path / "tiny-imagenet-200"), "zip", tmp_path / "raw", "tiny-imagenet-200")
    (tmp_path / "zipped").mkdir()
    shutil.copy(archive, tmp_path / "zipped")
    for path in ("raw/tiny-imagenet-200", "tiny-imagenet-200.zip", "zipped"):
        assert prepare.run(tiny(path), Paths(tmp_path))["hash"] == manifest["hash"]

    (folder / "words.txt").write_text("n01\tgoldfish\n")
    assert prepare.run(tiny(), Paths(tmp_path))["classes"] == ["goldfish", "n02", "n03"]


def test_odd_sizes_are_still_a_mismatch(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "raw")
    photo(1, "L", (32, 32)).save(folder / "train/n01/images/n01_0.JPEG")
    with pytest.raises(UserError, match=r"n01_0\.JPEG \(L, 32 x 32, not RGB of 64 x 64 pixels\) cannot be used"):
        prepare.run(tiny(), Paths(tmp_path))


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_classes(folder: Path) -> None:
    (folder / "wnids.txt").unlink()


def remove_annotations(folder: Path) -> None:
    (folder / "val/val_annotations.txt").unlink()


def remove_val_image(folder: Path) -> None:
    (folder / "val/images/val_0.JPEG").unlink()


def add_val_image(folder: Path) -> None:
    photo(1).save(folder / "val/images/val_9.JPEG")


def annotate_twice(folder: Path) -> None:
    with (folder / "val/val_annotations.txt").open("a") as file:
        file.write("val_0.JPEG\tn01\n")


def annotate_unknown_class(folder: Path) -> None:
    file = folder / "val/val_annotations.txt"
    file.write_text(file.read_text().replace("n02", "n09"))


def annotate_binary(folder: Path) -> None:
    (folder / "val/val_annotations.txt").write_bytes(b"\xff\xfe\x00")


def remove_class(folder: Path) -> None:
    shutil.rmtree(folder / "train/n03/images")


def remove_val_class(folder: Path) -> None:
    file = folder / "val/val_annotations.txt"
    file.write_text(file.read_text().replace("n02", "n01"))


def add_class(folder: Path) -> None:
    (folder / "train/n07/images").mkdir(parents=True)
    photo(1).save(folder / "train/n07/images/n07_0.JPEG")


def repeat_class(folder: Path) -> None:
    (folder / "wnids.txt").write_text("n01\nn02\nn03\nn01\n")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "everything": (
        remove_everything,
        r"raw: does not contain Tiny ImageNet\. Download http\S+ manually to \S+raw/ti",
    ),
    "classes": (remove_classes, r"tiny-imagenet-200: has no wnids\.txt, but test/, .* It is not Tiny ImageNet"),
    "annotations": (remove_annotations, r"tiny-imagenet-200: has no val/val_annotations\.txt"),
    "val_image": (
        remove_val_image,
        r"val/images/ do not match: val_0\.JPEG is in only one of them \(unmatched files: 1\)",
    ),
    "more_val_images": (add_val_image, r"val/images/ do not match: val_9\.JPEG is in only one of them"),
    "annotated_twice": (annotate_twice, r"val/val_annotations\.txt lists val_0\.JPEG twice"),
    "unknown_class": (annotate_unknown_class, r"val/val_annotations\.txt contains n09, which is not in wnids\.txt"),
    "binary_annotations": (
        annotate_binary,
        r"val_annotations\.txt: cannot be read \(.*utf-8.*\)\. Restore the original",
    ),
    "class": (remove_class, r"train/<wnid>/images/ has no image of n03 \(classes without images: 1\)"),
    "val_class": (remove_val_class, r"val/val_annotations\.txt has no image of n02 \(classes without images: 1\)"),
    "more_classes": (add_class, r"train/n07/images/n07_0\.JPEG: does not fit the layout train/<wnid>/images"),
    "repeated_class": (repeat_class, r"wnids\.txt lists 4 classes, n01 of them twice\. Restore the"),
}


@pytest.mark.parametrize(("make_broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_tree_gets_one_message(tmp_path: Path, make_broken: Callable[[Path], None], message: str) -> None:
    make_broken(make_tree(tmp_path / "raw"))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        prepare.run(tiny(), Paths(tmp_path))
    assert "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("model", ["wide_resnet_34_10", "preact_resnet18"])
def test_the_presets_fit_images_of_64_pixels(model: str) -> None:
    preset = settings_file.load(ROOT / f"presets/tiny_imagenet_{model}.yaml")
    published = settings_file.load(ROOT / f"presets/cifar100_{model}.yaml")
    assert (preset.prepare.source, preset.prepare.image_size) == ("tiny_imagenet", 64)
    assert preset.pretrain.architecture.name == "resnet18"
    assert preset.pretrain.architecture.strides == (1, 2, 2, 2)
    assert preset.train == published.train


@pytest.mark.skipif(not REAL.exists(), reason=f"Tiny ImageNet is not in {SHARED}")
def test_the_real_images(tmp_path: Path) -> None:
    manifest = prepare.run(tiny(str(REAL), train_per_class=5, test_per_class=2), Paths(tmp_path))
    assert manifest["classes"][:3] == ["goldfish", "European fire salamander", "bullfrog"]
    assert len(set(manifest["classes"])) == 200
    assert [set(split["per_class"]) for split in manifest["splits"].values()] == [{5}, {4}, {2}]
    assert 0 < manifest["converted"]["grey"] < 100
    with ZipFile(REAL) as archive:
        name = json.loads(Paths(tmp_path).names.read_text(encoding="utf-8"))["test"][0]
        with archive.open(name.removeprefix(f"{REAL}:")) as file:
            expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(load(Paths(tmp_path))["test"].images[0].permute(1, 2, 0).numpy(), expected)
