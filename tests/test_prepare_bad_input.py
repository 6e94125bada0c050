"""What a user may hand to the stage prepare by mistake, each with the one message that it gets."""

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from photos import make_folder, pack, photo, settings, snapshot
from PIL import Image

from d2r_core.errors import UserError
from tasks import prepare
from tasks.paths import Paths


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


def unsafe(member: str) -> Callable[[Path], None]:
    def broken_unsafe(folder: Path) -> None:
        broken_missing(folder)
        pack(folder.parent / "elsewhere", folder)
        with ZipFile(folder, "a") as archive:
            archive.writestr(member, b"evil")

    return broken_unsafe


def broken_zip_twice(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent / "elsewhere", folder / "a.zip")
    pack(folder.parent / "elsewhere", folder / "b.zip", lambda name: name == "train/dog/03.png")


def broken_zip_empty_class(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent / "elsewhere", folder)
    with ZipFile(folder, "a") as archive:
        archive.writestr("train/fox/", b"")


def broken_wrapped_zip(folder: Path) -> None:
    broken_missing(folder)
    pack(folder.parent, folder)


def broken_lonely(folder: Path) -> None:
    for file in sorted((folder / "train/dog").iterdir())[1:]:
        file.unlink()


BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (
        broken_text,
        r"photos/train/cat/notes\.png \(not an image\) cannot be read as an image\. Replace or remove",
    ),
    "truncated": (broken_truncated, r"photos/test/dog/00\.png \(.*truncated.*\) cannot be read as an image"),
    "many": (
        broken_many,
        r"6 files, .*cat/00\.png \(not an image\), .*cat/0\d\.png \(not an image\), \.\.\. cannot be read as im",
    ),
    "depth": (broken_depth, r"photos/train/cat/deep\.png \(has the mode I;16; 8-bit colour or grey is needed\)"),
    "empty_class": (
        broken_empty_class,
        r"photos: no image in train/fox/, test/fox/\. Put images there or remove the class",
    ),
    "classes": (
        broken_classes,
        r"photos: train/ and test/ have different classes: test/dogs/, train/dog/ has no counterpart",
    ),
    "one_class": (broken_one_class, r"photos: has one class only \(cat\); a classifier needs two"),
    "missing": (broken_missing, r"photos: does not exist\. Put the images there, or point prepare\.path"),
    "layout": (
        broken_layout,
        r"photos: no class folder in train/ and test/; found testing/, training/\. prepare\.path",
    ),
    "no_test": (broken_no_test, r"photos: no class folder in test/; found testing/, train/\."),
    "loose_image": (
        broken_loose_image,
        r"photos/train/loose\.png: is out of place; the layout is train/<class>/<image>",
    ),
    "nested": (broken_nested, r"photos/train/cat/tabby/: is out of place; the layout is train/<class>/<image>"),
    "two_layouts": (broken_both, r"photos: holds folders and archives \(more\.zip\); keep one of the two"),
    "no_archive": (
        broken_zip,
        r"photos/a\.zip: is not a zip archive, or a damaged one \(File is not a zip file\)\. Copy or pack it",
    ),
    "file": (
        broken_file,
        r"photos: is not a zip archive, or a damaged one \(File is not a zip file\)\. Copy or pack it again",
    ),
    "damaged_member": (broken_member_data, r"photos:t.*\.png \(.*\) cannot be read as an image"),
    "parent": (unsafe("../evil.png"), r"photos: the member '\.\./evil\.png' points outside the archive"),
    "hidden_parent": (
        unsafe("train/cat/../../../evil.png"),
        r"photos: the member 'train/cat/\.\./\.\./\.\./evil\.png' points outside",
    ),
    "absolute": (unsafe("/etc/evil.png"), r"photos: the member '/etc/evil\.png' points outside"),
    "backslash": (unsafe("..\\evil.png"), r"photos: the member .*evil\.png' points outside"),
    "member_twice": (
        broken_zip_twice,
        r"photos/b\.zip:train/dog/03\.png: stands in .*photos/a\.zip:train/dog/03\.png too",
    ),
    "zip_empty_class": (broken_zip_empty_class, r"photos: no image in train/fox/"),
    "wrapped_zip": (broken_wrapped_zip, r"photos: no class folder in train/ and test/; found elsewhere/\."),
    "lonely": (broken_lonely, r"photos: one training image only of dog; two are needed"),
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
    assert snapshot(tmp_path) == before


def test_mismatched_images_are_refused_if_the_settings_say_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    photo(1, "L").save(folder / "train/cat/grey.png")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"photos/train/cat/grey\.png \(L, 16 x 16\): not RGB of 16 x 16 pixels, and"):
        prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    for i in range(6):
        photo(i, size=(20, 30)).save(folder / f"test/dog/odd_{i}.png")
    message = (
        r"7 files, .*\(L, 16 x 16\), .*odd_0\.png \(RGB, 20 x 30\).*, \.\.\.: not RGB .* 'refuse'\. Convert by hand"
    )
    with pytest.raises(UserError, match=message):
        prepare.run(settings(on_mismatch="refuse"), Paths(tmp_path))
    assert {name: content for name, content in snapshot(tmp_path).items() if "odd_" not in name} == before
