"""A user's own data as versions under DVC: one archive for each data set, in data/raw/NAME/.

Git remembers which version a commit used (data/raw/NAME.dvc), DVC keeps the content. Nothing here imports DVC: it runs
as a child, as a person would run it.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import yaml

from d2r_core import files
from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.data import archive
from tasks.pipeline import dvc

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive knows
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")


@dataclass(frozen=True)
class Version:
    """A data set as data/raw/NAME.dvc records it."""

    name: str
    bytes: int
    md5: str  # of its content, as DVC counts it
    used: bool  # prepare.path names it
    here: bool  # its content is in data/raw, not in the cache or a remote only


@dataclass(frozen=True)
class Difference:
    """Two versions compared by the content of their files; each entry is a line for people."""

    added: list[str]
    removed: list[str]
    relabelled: list[str]  # same content, another folder
    same: int


def add(source: Path, name: str, paths: Paths, *, force: bool) -> tuple[Path, bool]:
    """Put a folder or an archive under DVC as data/raw/`name`; return that folder and whether its content is new.

    A folder is packed into one zip archive, the same bytes whenever its files are the same; an archive stays as it is.

    Raises:
        UserError: there is nothing that could be added, or `name` is taken by other content and not `force`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: a name has letters, digits, '.', '_' and '-', and starts with one of the first two."
        )
    dvc.order(paths)  # in a project's own folder?
    folder = _folder(name, paths)
    record = folder.with_name(f"{name}.dvc")
    if folder.exists() and not record.exists():
        raise UserError(f"{folder}: exists and is not under DVC. Move it elsewhere and add it from there.")
    if source.exists() and folder.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{source}: is the data set {name} itself. Add the folder or archive that it should become.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        _pack(source, new, name)
        if record.exists():
            if folder.exists() and _contents(new) == _contents(folder):
                return folder, False
            if not force:
                compared = (
                    "holds other content" if folder.exists() else "is not here to be compared (`dvc pull` fetches it)"
                )
                raise UserError(
                    f"{folder}: {compared}. `--force` makes this its new version; the old one stays in DVC's cache and "
                    f"in git's history of {record}. Or choose another --name."
                )
        _replace(folder, new, record, Path(scratch, "old"), paths)
    return folder, True


def versions(paths: Paths) -> list[Version]:
    """Every data set under data/raw, by name."""
    used = (paths.root / settings_file.load(paths.params).prepare.path).resolve()
    return [_version(record, used) for record in sorted(_folder("", paths).glob("*.dvc"))]


def compare(before: str, after: str, paths: Paths) -> Difference:
    """Compare two data sets, each a path, a name, or NAME@REVISION of git, file by file by the hash of the content.

    Raises:
        UserError: one of them is not there or cannot be read.
    """
    with _located(before, paths) as first, _located(after, paths) as second:
        old, new = _hashes(first), _hashes(second)
    both = old.keys() & new.keys()
    moved = {digest for digest in both if _places(old[digest]) != _places(new[digest])}
    return Difference(
        added=sorted(name for digest in new.keys() - both for name in new[digest]),
        removed=sorted(name for digest in old.keys() - both for name in old[digest]),
        relabelled=sorted(f"{', '.join(old[digest])} -> {', '.join(new[digest])}" for digest in moved),
        same=len(both) - len(moved),
    )


def _folder(name: str, paths: Paths) -> Path:
    return paths.root / "data/raw" / name


def _pack(source: Path, new: Path, name: str) -> None:
    """Fill the folder `new` with the archive that `source` is or becomes."""
    try:
        if source.is_dir():
            with ExitStack() as stack:
                entries = [entry for entry in archive.opened(source, stack) if entry.read]
                if not entries:
                    raise UserError(f"{source}: holds no file. Add a folder of images or an archive.")
                if all(entry.name.lower().endswith(_ARCHIVES) for entry in entries):
                    for entry in entries:  # a data set in parts
                        shutil.copyfile(entry.shown, new / PurePosixPath(entry.name).name)
                else:
                    _zip(entries, new / f"{name}.zip")
        elif source.is_file():
            if not source.name.lower().endswith(_ARCHIVES):
                raise UserError(f"{source}: is neither a folder nor an archive ({', '.join(_ARCHIVES)}).")
            shutil.copyfile(source, new / source.name)
        else:
            raise UserError(f"{source}: does not exist. Name a folder of images or an archive.")
    except OSError as error:
        raise UserError(f"{source}: cannot be read or packed ({error}).") from None


def _zip(entries: list[archive.Entry], target: Path) -> None:
    """Names, order, times and modes depend on nothing but the files; images are compressed already."""
    with ZipFile(target, "w", ZIP_STORED) as packed:
        for entry in entries:
            assert entry.read
            info = ZipInfo(entry.name, _TIME)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, wherever it is packed
            packed.writestr(info, entry.read())


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in folder.rglob("*") if path.is_file()}


def _replace(folder: Path, new: Path, record: Path, old: Path, paths: Paths) -> None:
    """Put `new` in the place of `folder` and tell DVC; if DVC fails, everything is as it was."""
    ignored = folder.with_name(".gitignore")
    texts = {file: file.read_bytes() if file.exists() else None for file in (record, ignored)}
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    try:
        dvc.ask(["add", "--quiet", str(folder.relative_to(paths.root))], paths)
    except BaseException:
        shutil.rmtree(folder)
        if old.exists():
            old.rename(folder)
        for file, text in texts.items():
            if text is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(text)
        raise


def _version(record: Path, used: Path) -> Version:
    folder = record.with_suffix("")
    try:
        (out,) = yaml.safe_load(record.read_text(encoding="utf-8"))["outs"]
        return Version(
            name=folder.name,
            bytes=int(out["size"]),
            md5=str(out["md5"]).removesuffix(".dir"),
            used=used.is_relative_to(folder.resolve()),
            here=folder.exists(),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{record}: cannot be read as a record of DVC ({error!r}). Restore it from git.") from None


@contextmanager
def _located(what: str, paths: Paths) -> Iterator[Path]:
    """Where the content of a data set lies while the context lasts."""
    name, _, revision = what.partition("@")
    if Path(what).exists():
        yield Path(what)
    elif not _NAME.fullmatch(name):
        raise UserError(f"{what}: does not exist; give a path, a name that `d2r data list` shows, or NAME@REVISION.")
    elif revision:
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, name)
            where = f"data/raw/{name}"
            try:
                dvc.ask(["get", ".", where, "--rev", revision, "--out", str(target)], paths)
            except UserError as error:
                raise UserError(
                    f"{what}: git has no such version of {where}, or its content is in no cache and no remote. "
                    f"DVC says: {error}"
                ) from None
            yield target
    elif _folder(name, paths).exists():
        yield _folder(name, paths)
    else:
        known = ", ".join(record.stem for record in sorted(_folder("", paths).glob("*.dvc"))) or "none"
        pull = " It is under DVC: `dvc pull` fetches it." if _folder(f"{name}.dvc", paths).exists() else ""
        raise UserError(f"{what}: is no path and no data set here; the data sets are: {known}.{pull}")


def _hashes(place: Path) -> dict[str, list[str]]:
    """SHA-256 of every file's content -> the names it has, sorted; zip archives are looked into, not unpacked."""
    found: dict[str, list[str]] = {}
    with ExitStack() as stack:
        for entry in archive.opened(place, stack):
            if entry.read and place.is_dir() and entry.name.lower().endswith(".zip"):
                for digest, names in _hashes(Path(entry.shown)).items():
                    found.setdefault(digest, []).extend(names)
            elif entry.read:
                found.setdefault(hashlib.sha256(entry.read()).hexdigest(), []).append(entry.name)
    return {digest: sorted(names) for digest, names in found.items()}


def _places(names: list[str]) -> list[str]:
    """The folders that hold a content: its split and class."""
    return sorted(str(PurePosixPath(name).parent) for name in names)
