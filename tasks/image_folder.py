"""The layout `train/<class>/<image>`, `test/<class>/<image>`: in a folder, a zip archive, or several archives merged.

Archives are read in place; nothing of them is extracted to the disk.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

from PIL import Image

from d2r_core.errors import UserError

Opener = Callable[[], Image.Image]
SPLITS = ("train", "test")
_LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")
_LAYOUT = "train/<class>/<image> and test/<class>/<image>"


class Entry(NamedTuple):
    """A file or a folder (its name ends in "/") in one of the places that are merged."""

    name: str  # relative to that place, with "/" between the parts
    shown: str  # how messages name it
    open: Opener | None  # None for a folder


@contextmanager
def opened(path: Path) -> Iterator[dict[str, dict[str, list[Entry]]]]:
    """The images of `path` as split -> class -> entries, classes and entries sorted by name.

    Hidden files are left out. The entries can be opened while the context lasts.

    Raises:
        UserError: nothing is there, an archive is damaged, or the layout is another one.
    """
    with ExitStack() as stack:
        try:
            if path.is_dir():
                archives = sorted(file for file in path.iterdir() if _is_archive(file))
                if not archives:
                    entries = list(_folder_entries(path))
                elif any((path / split).exists() for split in SPLITS):
                    raise UserError(f"{path}: holds folders and archives ({archives[0].name}); keep one of the two.")
                else:
                    entries = [entry for file in archives for entry in _zip_entries(file, stack)]
            elif path.exists():
                entries = list(_zip_entries(path, stack))
            else:
                raise UserError(
                    f"{path}: does not exist. Put the images there, or point prepare.path (params.yaml) at a folder "
                    f"or zip archive with {_LAYOUT}."
                )
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}).") from None
        yield _arrange(path, entries)


def _folder_entries(path: Path) -> Iterator[Entry]:
    """All that stands in `path`; below train/ and test/ as deep as the layout goes."""

    def walk(folder: Path, depth: int) -> Iterator[Entry]:
        for child in folder.iterdir():
            name = child.relative_to(path).as_posix()
            if child.is_dir():
                yield Entry(f"{name}/", f"{child}/", None)
                if depth < 2 and name.split("/")[0] in SPLITS:
                    yield from walk(child, depth + 1)
            else:
                yield Entry(name, str(child), partial(Image.open, child))

    return walk(path, 0)


def _zip_entries(path: Path, stack: ExitStack) -> Iterator[Entry]:
    """The members of an archive, which stays open as long as `stack`."""
    try:
        archive = stack.enter_context(ZipFile(path))
    except BadZipFile as error:
        raise UserError(
            f"{path}: is not a zip archive, or a damaged one ({error}). Copy or pack it again; prepare.path "
            f"(params.yaml) takes a folder or zip archives with {_LAYOUT}."
        ) from None
    for info in archive.infolist():
        name = info.filename
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
            raise UserError(
                f"{path}: the member {name!r} points outside the archive or is not a plain path. "
                "Pack the archive again with relative names."
            )
        yield Entry(name, f"{path}:{name}", None if info.is_dir() else partial(_open_member, archive, info))


def _open_member(archive: ZipFile, info: ZipInfo) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(info)))


def _arrange(path: Path, entries: Iterable[Entry]) -> dict[str, dict[str, list[Entry]]]:
    """Sort the entries into splits and classes; every file below train/ and test/ must fit the layout."""
    found: dict[str, dict[str, list[Entry]]] = {split: {} for split in SPLITS}
    tops = set()
    previous = None
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.shown)):
        parts = entry.name.rstrip("/").split("/")
        if _hidden(parts):
            continue
        tops.add(parts[0] if entry.open and len(parts) == 1 else f"{parts[0]}/")
        if parts[0] not in SPLITS or (entry.open is None and len(parts) == 1):
            continue
        if entry.open and previous and previous.name == entry.name:
            raise UserError(f"{entry.shown}: stands in {previous.shown} too. Rename or remove one of the two.")
        previous = entry
        if len(parts) == 2 and entry.open is None:
            found[parts[0]].setdefault(parts[1], [])
        elif len(parts) == 3 and entry.open:
            found[parts[0]].setdefault(parts[1], []).append(entry)
        else:
            raise UserError(f"{entry.shown}: is out of place; the layout is {_LAYOUT}. Move or remove it.")
    _check(path, found, sorted(tops))
    return {split: dict(sorted(classes.items())) for split, classes in found.items()}


def _is_archive(file: Path) -> bool:
    return file.suffix.lower() == ".zip" and not _hidden([file.name])


def _hidden(parts: list[str]) -> bool:
    """Whether the file was left by an operating system, not by a person."""
    return any(part.startswith(".") or part in _LEFT_BY_SYSTEMS for part in parts)


def _check(path: Path, found: dict[str, dict[str, list[Entry]]], tops: list[str]) -> None:
    missing = [split for split in SPLITS if not found[split]]
    if missing:
        there = ", ".join(tops[:5]) + (", ..." if len(tops) > 5 else "") or "nothing"
        raise UserError(
            f"{path}: no class folder in {'/ and '.join(missing)}/; found {there}. "
            f"prepare.path (params.yaml) takes a folder or zip archives with {_LAYOUT}."
        )
    empty = [f"{split}/{name}/" for split in SPLITS for name, files in sorted(found[split].items()) if not files]
    if empty:
        raise UserError(f"{path}: no image in {', '.join(empty)}. Put images there or remove the class.")
