"""Files in a folder or a zip archive, listed with distrust and read in place: nothing is extracted to the disk."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

from d2r_core.errors import UserError

MAX_FILES = 2_000_000
MAX_FILE_BYTES = 2**28  # a file is read into memory as a whole
MAX_TOTAL_BYTES = 2**40  # of all files of an archive, unpacked
MAX_RATIO = 200  # of all files, unpacked, to the archive; deflate itself reaches 1032
_LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")
_ENCRYPTED = 0x1  # in the flags of a zip member


class Entry(NamedTuple):
    """A file or a folder (its name ends in "/")."""

    name: str  # relative to the place that was listed, with "/" between the parts
    shown: str  # how messages name it
    read: Callable[[], bytes] | None  # None for a folder; threads may read at the same time


def opened(path: Path, stack: ExitStack) -> list[Entry]:
    """All that stands in a folder or zip archive, sorted by name; hidden files are left out.

    The entries can be read as long as `stack` is open. If everything lies in one folder, as in most archives, names are
    relative to that one, unless it is called train or test.

    Raises:
        UserError: nothing is there, an archive is damaged, or what it holds cannot be trusted.
    """
    if not path.exists():
        raise UserError(
            f"{path}: does not exist. Put the data there, or let prepare.path (params.yaml) name its place."
        )
    try:
        entries = list(_folder(path) if path.is_dir() else _zip(path, stack))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    return _unwrapped(sorted(entries, key=lambda entry: entry.name))


def hidden(name: str) -> bool:
    """Whether a file was left by an operating system, not by a person."""
    return any(part.startswith(".") or part in _LEFT_BY_SYSTEMS for part in name.split("/"))


def _folder(path: Path) -> Iterator[Entry]:
    found = 0

    def walk(folder: Path, prefix: str) -> Iterator[Entry]:
        nonlocal found
        with os.scandir(folder) as children:
            for child in children:
                if hidden(child.name):
                    continue
                name, shown = f"{prefix}{child.name}", str(folder / child.name)
                found += 1
                if found > MAX_FILES:
                    raise UserError(f"{path}: holds more than {MAX_FILES} files. Name the folder of the images only.")
                if child.is_symlink():
                    raise UserError(f"{shown}: is a link, and may lead anywhere. Put the files themselves there.")
                if child.is_dir():
                    yield Entry(f"{name}/", f"{shown}/", None)
                    yield from walk(folder / child.name, f"{name}/")
                elif child.is_file():
                    yield Entry(name, shown, partial(_read_file, folder / child.name))
                else:
                    raise UserError(f"{shown}: is neither a file nor a folder. Remove it.")

    return walk(path, "")


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES // 2**20} MiB")
    return content


def _zip(path: Path, stack: ExitStack) -> Iterator[Entry]:
    try:
        archive = stack.enter_context(ZipFile(path))
    except (BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{path}: is not a zip archive, or a damaged one ({error}). Copy or pack it again; prepare.path "
            "(params.yaml) takes a folder or a zip archive."
        ) from None
    members = archive.infolist()
    _check_size(path, members)
    lock = Lock()
    for member in members:
        _check_member(path, member)
        name = member.filename
        if not hidden(name):
            read = None if member.is_dir() else partial(_read_member, archive, member, lock)
            yield Entry(name, f"{path}:{name}", read)


def _check_size(path: Path, members: list[ZipInfo]) -> None:
    """Refuse an archive that would fill memory or time: a bomb."""
    total = sum(member.file_size for member in members)
    if len(members) > MAX_FILES:
        raise UserError(f"{path}: has {len(members)} members; at most {MAX_FILES} are allowed. Pack the images only.")
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{path}: holds {total / 2**30:.0f} GiB, unpacked; at most {MAX_TOTAL_BYTES // 2**30} are allowed. "
            "Pack fewer or smaller images."
        )
    # Also where members share their compressed bytes, since it is the whole archive that counts.
    ratio = total / path.stat().st_size
    if ratio > MAX_RATIO:
        raise UserError(
            f"{path}: unpacks to {ratio:.0f} times its size; at most {MAX_RATIO} are allowed. Images do not compress "
            "that well: look at what it holds, or unpack it by hand and name the folder."
        )


def _check_member(path: Path, member: ZipInfo) -> None:
    """Refuse what is not a plain file or folder below the archive's top."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
        raise UserError(
            f"{path}: the member {name!r} points outside the archive or is not a plain path. "
            "Pack the archive again with relative names."
        )
    if kind == stat.S_IFLNK:
        raise UserError(
            f"{path}: the member {name!r} is a link, and may lead anywhere. Pack the files themselves (zip without -y)."
        )
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: packed by a system without such kinds
        raise UserError(f"{path}: the member {name!r} is neither a file nor a folder. Pack the archive without it.")
    if member.flag_bits & _ENCRYPTED:
        raise UserError(f"{path}: the member {name!r} is encrypted. Pack the archive again without a password.")
    if member.file_size > MAX_FILE_BYTES:
        raise UserError(
            f"{path}: the member {name!r} has {member.file_size / 2**20:.0f} MiB, unpacked; at most "
            f"{MAX_FILE_BYTES // 2**20} are allowed. Pack the archive without it."
        )


def _read_member(archive: ZipFile, member: ZipInfo, lock: Lock) -> bytes:
    with lock, archive.open(member) as file:
        # Never more than the size that was checked, whatever the compressed data hold.
        return file.read(member.file_size)


def _unwrapped(entries: list[Entry]) -> list[Entry]:
    tops = {entry.name.split("/")[0] for entry in entries}
    deep = any(entry.read and entry.name.count("/") > 1 for entry in entries)
    if not deep or len(tops) > 1 or tops <= {"train", "test"}:
        return entries
    return [entry._replace(name=rest) for entry in entries if (rest := entry.name.partition("/")[2])]
