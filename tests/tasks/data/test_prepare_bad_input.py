"""Invalid inputs of the stage `prepare`, each with its error message."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from photos import make_folder, pack, photo, settings, snapshot
from PIL import Image

from d2r_core.errors import UserError
from tasks import prepare
from tasks.config.paths import Paths


def broken_text(folder: Path) -> None:
    (folder / "train/cat/notes.png").write_text("not an image", encoding="utf-8")


def broken_truncated(folder: Path) -> None:
    file = folder / "test/dog/00.png"
    file.write_bytes(file.read_bytes()[:-300])


def broken_many(folder: Path) -> None:
    for i in range(6):
        (folder / f"train/cat/{i:02}.png").write_bytes(b"")


def broken_depth(folder: Path) -> None:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(folder / "train/cat/deep.png")


def broken_empty_class(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "fox").mkdir()
    (folder / "train/fox/.DS_Store").write_bytes(b"junk")


def broken_classes(folder: Path) -> None:
    (folder / "test/dog").rename(folder / "test/dogs")


def broken_one_class(folder: Path) -> None:
    for split in ("train", "test"):
        for file in (folder / split / "dog").iterdir():
            file.unlink()
        (folder / split / "dog").rmdir()


def broken_missing(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")


def broken_layout(folder: Path) -> None:
    (folder / "train").rename(folder / "training")
    (folder / "test").rename(folder / "testing")


def broken_no_test(folder: Path) -> None:
    (folder / "test").rename(folder / "testing")


def broken_loose_image(folder: Path) -> None:
    photo(1).save(folder / "train/loose.png")


def broken_nested(folder: Path) -> None:
    (folder / "train/cat/tabby").mkdir()


def broken_both(folder: Path) -> None:
    pack(folder, folder / "more.zip")


def broken_zip(folder: Path) -> None:
    broken_missing(folder)
    folder.mkdir()
    (folder / "a.zip").write_text("no archive", encoding="utf-8")


def broken_file(folder: Path) -> None:
    broken_missing(folder)
    folder.write_text("no archive", encoding="utf-8")


def broken_member_data(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent / "elsewhere", folder)
    content = bytearray(folder.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 0xFF
    folder.write_bytes(content)


def broken_zip_twice(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent / "elsewhere", folder / "a.zip")
    pack(folder.parent / "elsewhere", folder / "b.zip", lambda name: name == "train/dog/03.png")


def broken_zip_empty_class(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent / "elsewhere", folder)
    with ZipFile(folder, "a") as archive:
        archive.writestr("train/fox/", b"")


def broken_pixels(folder: Path) -> None:
    Image.new("1", (9000, 9000)).save(folder / "train/cat/large.png")


def broken_many_pixels(folder: Path) -> None:
    content = bytearray((folder / "train/cat/00.png").read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / "train/cat/large.png").write_bytes(content)


def broken_program(folder: Path) -> None:
    photo(1).save(folder / "train/cat/drawing.eps")  # Pillow would start Ghostscript


def broken_empty_folder(folder: Path) -> None:
    broken_missing(folder)
    folder.mkdir()


def broken_no_train(folder: Path) -> None:
    (folder / "train").rename(folder.parent / "train")


def broken_link(folder: Path) -> None:
    (folder / "train/cat/link.png").symlink_to(folder / "train/cat/00.png")


def broken_link_to_folder(folder: Path) -> None:
    (folder / "train/fox").symlink_to(folder / "train/cat")


def broken_pipe(folder: Path) -> None:
    os.mkfifo(folder / "train/cat/pipe.png")


def broken_single_image(folder: Path) -> None:
    for file in sorted((folder / "train/dog").iterdir())[1:]:
        file.unlink()


BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (
        broken_text,
        r"photos/train/cat/notes\.png \(not an image\) cannot be used\. Replace or remove them, or set",
    ),
    "truncated": (broken_truncated, r"photos/test/dog/00\.png \(.*truncated.*\) cannot be used\."),
    "many": (
        broken_many,
        r"6 images cannot be used: .*cat/00\.png \(not an image\), .*cat/0\d\.png \(not an image\), \.\.\.\. Repl",
    ),
    "depth": (broken_depth, r"photos/train/cat/deep\.png \(has the mode I;16; 8-bit colour or grey is required\)"),
    "pixels": (broken_pixels, r"cat/large\.png \(has 9000 x 9000 pixels; at most 67108864 are allowed\) cannot be"),
    "many_pixels": (broken_many_pixels, r"cat/large\.png \(has far more than 67108864 pixels, the maximum"),
    "program": (broken_program, r"photos/train/cat/drawing\.eps \(not an image\) cannot be used"),
    "empty_class": (
        broken_empty_class,
        r"photos: there are no images in train/fox/, test/fox/\. Add images or remove the class",
    ),
    "classes": (
        broken_classes,
        r"photos: train/ and test/ have different classes: test/dogs/, train/dog/ is missing in the other split",
    ),
    "one_class": (broken_one_class, r"photos: has only one class \(cat\); a classifier needs at least two"),
    "missing": (broken_missing, r"photos: does not exist\. Put the data there, or set prepare\.path"),
    "empty_folder": (broken_empty_folder, r"photos: has no class folder \(no folders\)\. The layout is train/<class>/"),
    "layout": (broken_layout, r"photos/testing/cat/: does not fit the layout train/<class>/<image> and .*, or"),
    "no_train": (broken_no_train, r"photos: has the folders test/; only train/ and test/ may be combined\."),
    "third_split": (
        broken_no_test,
        r"photos: has the folders testing/, train/; only train/ and test/ may be combined\. Rename or move",
    ),
    "loose_image": (
        broken_loose_image,
        r"photos/train/loose\.png: does not fit the layout train/<class>/<image>",
    ),
    "nested": (broken_nested, r"photos/train/cat/tabby/: does not fit the layout train/<class>/<image>"),
    "link": (broken_link, r"photos/train/cat/link\.png: is a link, which is not followed\. Put the files themselves"),
    "link_to_folder": (broken_link_to_folder, r"photos/train/fox: is a link, which is not followed"),
    "pipe": (broken_pipe, r"photos/train/cat/pipe\.png: is neither a file nor a folder\. Remove it"),
    "two_layouts": (broken_both, r"photos: contains both folders and archives \(more\.zip\)\. Keep only one kind"),
    "no_archive": (
        broken_zip,
        r"photos/a\.zip: is not a zip archive or is damaged \(File is not a zip file\)\. Copy or create it",
    ),
    "file": (
        broken_file,
        r"photos: is not a zip archive or is damaged \(File is not a zip file\)\. Copy or create it again",
    ),
    "damaged_member": (broken_member_data, r"photos:t.*\.png \(.*\) cannot be used"),
    "member_twice": (
        broken_zip_twice,
        r"photos/b\.zip:train/dog/03\.png: has the same name as .*photos/a\.zip:train/dog/03\.png",
    ),
    "zip_empty_class": (broken_zip_empty_class, r"photos: there are no images in train/fox/"),
    "single_image": (
        broken_single_image,
        r"photos: too few images of dog: the validation split takes at least one of each",
    ),
}


@pytest.mark.parametrize(("make_broken", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_message_and_changes_nothing(
    tmp_path: Path, make_broken: Callable[[Path], None], message: str
) -> None:
    folder = make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    make_broken(folder)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        prepare.run(settings(), Paths(tmp_path))
    assert "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before


def test_bad_input_on_a_first_run_leaves_nothing_behind(tmp_path: Path) -> None:
    broken_text(make_folder(tmp_path))
    before = snapshot(tmp_path)
    with pytest.raises(UserError):
        prepare.run(settings(), Paths(tmp_path))
    empty = {"data": b"", "data/prepared": b""}
    assert snapshot(tmp_path) == before | empty


def test_mismatched_images_can_be_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    photo(1, "L").save(folder / "train/cat/grey.png")
    before = snapshot(tmp_path)
    with pytest.raises(
        UserError, match=r"photos/train/cat/grey\.png \(L, 16 x 16, not RGB of 16 x 16 pixels\) cannot be"
    ):
        prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    for i in range(6):
        photo(i, size=(20, 30)).save(folder / f"test/dog/odd_{i}.png")
    message = (
        r"7 images cannot be used: .*\(L, 16 x 16, .*odd_0\.png \(RGB, 20 x 30, .*, \.\.\.\. .*'convert' accepts grey"
    )
    with pytest.raises(UserError, match=message):
        prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    assert {name: content for name, content in snapshot(tmp_path).items() if "odd_" not in name} == before
