"""Untrusted files in a folder or a zip archive, checked and read in place: nothing is extracted to disk."""

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
MAX_RATIO = 200  # of the unpacked size of all files to the size of the archive; deflate can reach 1032
_SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")
_ENCRYPTED = 0x1  # in the flags of a zip member


class Entry(NamedTuple):
    """A file, or a folder, whose name ends in "/"."""

    name: str  # relative to the listed folder or archive, with "/" as separator
    display_name: str  # in messages
    read: Callable[[], bytes] | None  # None for a folder; safe to call from several threads


def list_entries(path: Path, stack: ExitStack) -> list[Entry]:
    """All files and folders in a folder or zip archive, sorted by name, without hidden files.

    The entries can be read as long as `stack` is open. If everything is in one top-level folder, as in most archives,
    names are relative to that folder, unless it is called train or test.

    Raises:
        UserError: `path` does not exist, an archive is damaged, or the content is not safe to read.
    """
    if not path.exists():
        raise UserError(
            f"{path}: does not exist. Put the data there, or set prepare.path (params.yaml) to its location."
        )
    try:
        entries = list(_folder(path) if path.is_dir() else _zip(path, stack))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    return _strip_top_folder(sorted(entries, key=lambda entry: entry.name))


def hidden(name: str) -> bool:
    """Whether a file is hidden or was created by an operating system."""
    return any(part.startswith(".") or part in _SYSTEM_FILES for part in name.split("/"))


def _folder(path: Path) -> Iterator[Entry]:
    count = 0

    def walk(folder: Path, prefix: str) -> Iterator[Entry]:
        nonlocal count
        with os.scandir(folder) as children:
            for child in children:
                if hidden(child.name):
                    continue
                name, display_name = f"{prefix}{child.name}", str(folder / child.name)
                count += 1
                if count > MAX_FILES:
                    raise UserError(
                        f"{path}: contains more than {MAX_FILES} files. Set prepare.path to the folder of the images."
                    )
                if child.is_symlink():
                    raise UserError(
                        f"{display_name}: is a link, which is not followed. Put the files themselves there."
                    )
                if child.is_dir():
                    yield Entry(f"{name}/", f"{display_name}/", None)
                    yield from walk(folder / child.name, f"{name}/")
                elif child.is_file():
                    yield Entry(name, display_name, partial(_read_file, folder / child.name))
                else:
                    raise UserError(f"{display_name}: is neither a file nor a folder. Remove it.")

    return walk(path, "")


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    return content


def _zip(path: Path, stack: ExitStack) -> Iterator[Entry]:
    try:
        archive = stack.enter_context(ZipFile(path))
    except (BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{path}: is not a zip archive or is damaged ({error}). Copy or create it again; prepare.path "
            "(params.yaml) must be a folder or a zip archive."
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
    """Refuse an archive that would exhaust memory or time (a zip bomb)."""
    total = sum(member.file_size for member in members)
    if len(members) > MAX_FILES:
        raise UserError(f"{path}: has {len(members)} members; at most {MAX_FILES} are allowed. Pack only the images.")
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{path}: unpacks to {total / 2**30:.0f} GiB; at most {MAX_TOTAL_BYTES // 2**30} GiB are allowed. "
            "Pack fewer or smaller images."
        )
    # Relative to the whole archive, since several members may share the same compressed bytes.
    ratio = total / path.stat().st_size
    if ratio > MAX_RATIO:
        raise UserError(
            f"{path}: unpacks to {ratio:.0f} times its size; at most {MAX_RATIO} times is allowed, since images do not "
            "compress that well. Check its content, or unpack it manually and set prepare.path to the folder."
        )


def _check_member(path: Path, member: ZipInfo) -> None:
    """Refuse a member that is not a plain file or folder inside the archive."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
        raise UserError(
            f"{path}: the member {name!r} points outside the archive or is not a plain path. "
            "Create the archive again with relative names."
        )
    if kind == stat.S_IFLNK:
        raise UserError(
            f"{path}: the member {name!r} is a link, which is not followed. Pack the files themselves (zip without -y)."
        )
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: created on a system without Unix modes
        raise UserError(f"{path}: the member {name!r} is neither a file nor a folder. Create the archive without it.")
    if member.flag_bits & _ENCRYPTED:
        raise UserError(f"{path}: the member {name!r} is encrypted. Create the archive without a password.")
    if member.file_size > MAX_FILE_BYTES:
        raise UserError(
            f"{path}: the member {name!r} unpacks to {member.file_size / 2**20:.0f} MiB; at most "
            f"{MAX_FILE_BYTES // 2**20} MiB are allowed. Create the archive without it."
        )


def _read_member(archive: ZipFile, member: ZipInfo, lock: Lock) -> bytes:
    with lock, archive.open(member) as file:
        # Never more than the size that was checked, whatever the compressed data contain.
        return file.read(member.file_size)


def _strip_top_folder(entries: list[Entry]) -> list[Entry]:
    tops = {entry.name.split("/")[0] for entry in entries}
    deep = any(entry.read and entry.name.count("/") > 1 for entry in entries)
    if not deep or len(tops) > 1 or tops <= {"train", "test"}:
        return entries
    return [entry._replace(name=rest) for entry in entries if (rest := entry.name.partition("/")[2])]
