"""Unsafe zip archives: each is refused with its own message, and nothing is unpacked."""

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
from photos import make_folder, pack, settings, snapshot

from d2r_core.errors import UserError
from tasks import prepare
from tasks.config.paths import Paths
from tasks.data import archive


def member(name: str, kind: int = 0) -> Callable[[Path], None]:
    """Add a member with this name and file type."""

    def add(path: Path) -> None:
        info = ZipInfo(name)
        info.external_attr = (kind | 0o644) << 16
        with ZipFile(path, "a") as target:
            target.writestr(info, b"/etc/passwd")

    return add


def bomb(path: Path) -> None:
    with ZipFile(path, "a", ZIP_DEFLATED) as target:
        target.writestr("train/cat/bomb.bmp", bytes(2**26))


def overlap(path: Path) -> None:
    """Many directory entries for the same compressed bytes."""
    with ZipFile(path, "a", ZIP_DEFLATED) as target:
        target.writestr("train/cat/x.bmp", bytes(2**20))
        info = target.getinfo("train/cat/x.bmp")
        for i in range(50):
            entry = ZipInfo(f"train/cat/{i}.bmp")
            for key in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(entry, key, getattr(info, key))
            target.filelist.append(entry)


def patch(path: Path, offset: int, value: bytes) -> None:
    """Overwrite bytes of every directory entry."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\1\2")
    while at >= 0:
        content[at + offset : at + offset + len(value)] = value
        at = content.find(b"PK\1\2", at + 46)
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    patch(path, 8, struct.pack("<H", 1))


def large(path: Path) -> None:
    patch(path, 24, struct.pack("<I", 2**32 - 2))


def method(path: Path) -> None:
    patch(path, 10, struct.pack("<H", 97))


def checksum(path: Path) -> None:
    patch(path, 16, b"evil")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def directory(path: Path) -> None:
    patch(path, 0, b"evil")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent": (member("../evil.png"), r"the member '\.\./evil\.png' points outside the archive"),
    "hidden_parent": (member("train/cat/../../../evil.png"), r"the member 'train/cat/\.\./.*evil\.png' points outside"),
    "absolute": (member("/etc/evil.png"), r"the member '/etc/evil\.png' points outside the archive or is not a plain"),
    "backslash": (member("..\\evil.png"), r"the member .*evil\.png' points outside"),
    "drive": (member("C:/evil.png"), r"the member 'C:/evil\.png' points outside"),
    "link": (
        member("train/cat/l.png", stat.S_IFLNK),
        r"the member 'train/cat/l\.png' is a link, which is not followed",
    ),
    "hidden_link": (member("__MACOSX/l", stat.S_IFLNK), r"the member '__MACOSX/l' is a link, which is not followed"),
    "device": (member("train/cat/d.png", stat.S_IFBLK), r"the member 'train/cat/d\.png' is neither a file nor a fold"),
    "bomb": (
        bomb,
        r"unpacks to \d{3,4} times its size; at most 200 times is allowed, since images do not",
    ),
    "overlap": (overlap, r"unpacks to \d{4} times its size; at most 200 times is allowed"),
    "encrypted": (encrypted, r"the member 't.*\.png' is encrypted\. Create the archive without a password"),
    "truncated": (truncated, r"is not a zip archive or is damaged \(File is not a zip file\)\. Copy or create it"),
    "directory": (directory, r"is not a zip archive or is damaged \(Bad magic number for central directory\)"),
    "method": (
        method,
        r"photos\.zip:t.* \(That compression method is not supported\).* cannot|cannot be used: .*method",
    ),
    "checksum": (checksum, r"images cannot be used: .*photos\.zip:t.*\.png \(Bad CRC-32 for file"),
}


@pytest.mark.parametrize(("make_bad", "message"), BAD.values(), ids=BAD.keys())
def test_unsafe_archives_are_refused(tmp_path: Path, make_bad: Callable[[Path], None], message: str) -> None:
    pack(make_folder(tmp_path), tmp_path / "photos.zip")
    prepare.run(settings(path="photos.zip"), Paths(tmp_path))
    make_bad(tmp_path / "photos.zip")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        prepare.run(settings(path="photos.zip"), Paths(tmp_path))
    assert "photos.zip" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILES", 17, r"photos\.zip: has 18 members; at most 17 are allowed\. Pack only the images"),
        ("MAX_TOTAL_BYTES", 2**13, r"photos\.zip: unpacks to 0 GiB; at most 0 GiB are allowed"),
        ("MAX_FILE_BYTES", 2**9, r"photos\.zip: the member 't.*png' unpacks to 0 MiB; at most 0 MiB are allowed"),
    ],
)
def test_an_archive_has_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    pack(make_folder(tmp_path), tmp_path / "photos.zip")
    monkeypatch.setattr(archive, limit, value)
    with pytest.raises(UserError, match=message):
        prepare.run(settings(path="photos.zip"), Paths(tmp_path))


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILES", 17, r"photos: contains more than 17 files\. Set prepare\.path to the folder of the images"),
        ("MAX_FILE_BYTES", 2**9, r"18 images cannot be used: .*photos/train/cat/00\.png \(larger than 0 MiB\)"),
    ],
)
def test_a_folder_has_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(archive, limit, value)
    with pytest.raises(UserError, match=message):
        prepare.run(settings(), Paths(tmp_path))


def test_a_member_is_not_unpacked_beyond_its_declared_size(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    pack(make_folder(tmp_path), path)
    bomb(path)
    with ZipFile(path) as source:
        assert source.getinfo("train/cat/bomb.bmp").file_size == 2**26
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 2**26), struct.pack("<I", 100)))
    with pytest.raises(UserError, match=r"photos\.zip:train/cat/bomb\.bmp \(Bad CRC-32.*\) cannot be used"):
        prepare.run(settings(path="photos.zip"), Paths(tmp_path))


def test_an_archive_of_another_system_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_LZMA) as target:
        for file in folder.rglob("*.png"):
            info = ZipInfo(file.relative_to(folder).as_posix())
            info.create_system = 0
            target.writestr(info, file.read_bytes(), zipfile.ZIP_LZMA)
    assert (
        prepare.run(settings(path="photos.zip"), Paths(tmp_path))["hash"]
        == (prepare.run(settings(), Paths(tmp_path))["hash"])
    )
