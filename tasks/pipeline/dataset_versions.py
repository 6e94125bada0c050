"""Versions a user's own data with DVC: one archive per data set, in data/raw/NAME/.

Git records which version a commit uses (data/raw/NAME.dvc), DVC stores the content. DVC is not imported, but runs as a
child process, as on the command line.
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
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest time in a zip archive
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")


@dataclass(frozen=True)
class Version:
    """A data set as recorded in data/raw/NAME.dvc."""

    name: str
    bytes: int
    md5: str  # of its content, as DVC computes it
    used: bool  # prepare.path refers to it
    present: bool  # in data/raw, not only in the cache or a remote


@dataclass(frozen=True)
class Difference:
    """The differences of two versions by the content of their files; each entry is a line of text."""

    added: list[str]
    removed: list[str]
    relabelled: list[str]  # same content in another folder
    unchanged: int


def add(source: Path, name: str, paths: Paths, *, force: bool) -> tuple[Path, bool]:
    """Add a folder or an archive to DVC as data/raw/`name`; return that folder and whether its content is new.

    A folder is packed into one zip archive, with the same bytes whenever its files are the same; an archive is copied.

    Raises:
        UserError: the source cannot be added, or `name` has other content and `force` is false.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: a name may contain letters, digits, '.', '_' and '-', and starts with a letter or digit."
        )
    dvc.order(paths)  # raises outside of a project
    folder = _folder(name, paths)
    record = folder.with_name(f"{name}.dvc")
    if folder.exists() and not record.exists():
        raise UserError(f"{folder}: exists and is not tracked by DVC. Move it elsewhere and add it from there.")
    if source.exists() and folder.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{source}: is part of the data set {name} itself. Add a folder or archive from elsewhere.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        _pack(source, new, name)
        if record.exists():
            if folder.exists() and _contents(new) == _contents(folder):
                return folder, False
            if not force:
                reason = "has other content" if folder.exists() else "is not present for comparison (run `dvc pull`)"
                raise UserError(
                    f"{folder}: {reason}. `--force` makes this its new version; the old one stays in DVC's cache and "
                    f"in the git history of {record}. Or choose another --name."
                )
        _replace(folder, new, record, Path(scratch, "old"), paths)
    return folder, True


def versions(paths: Paths) -> list[Version]:
    """Every data set under data/raw, by name."""
    used = (paths.root / settings_file.load(paths.params).prepare.path).resolve()
    return [_version(record, used) for record in sorted(_folder("", paths).glob("*.dvc"))]


def compare(before: str, after: str, paths: Paths) -> Difference:
    """Compare two data sets file by file, by the hash of the content. Each is a path, a name, or NAME@GIT_REVISION.

    Raises:
        UserError: one of them does not exist or cannot be read.
    """
    with _locate(before, paths) as first, _locate(after, paths) as second:
        old, new = _hashes(first), _hashes(second)
    both = old.keys() & new.keys()
    moved = {digest for digest in both if _folders(old[digest]) != _folders(new[digest])}
    return Difference(
        added=sorted(name for digest in new.keys() - both for name in new[digest]),
        removed=sorted(name for digest in old.keys() - both for name in old[digest]),
        relabelled=sorted(f"{', '.join(old[digest])} -> {', '.join(new[digest])}" for digest in moved),
        unchanged=len(both) - len(moved),
    )


def _folder(name: str, paths: Paths) -> Path:
    return paths.root / "data/raw" / name


def _pack(source: Path, new: Path, name: str) -> None:
    """Copy the archive `source` into the folder `new`, or pack the folder `source` into an archive there."""
    try:
        if source.is_dir():
            with ExitStack() as stack:
                entries = [entry for entry in archive.list_entries(source, stack) if entry.read]
                if not entries:
                    raise UserError(f"{source}: contains no files. Add a folder of images or an archive.")
                if all(entry.name.lower().endswith(_ARCHIVES) for entry in entries):
                    for entry in entries:  # a data set of several archives
                        shutil.copyfile(entry.display_name, new / PurePosixPath(entry.name).name)
                else:
                    _zip(entries, new / f"{name}.zip")
        elif source.is_file():
            if not source.name.lower().endswith(_ARCHIVES):
                raise UserError(f"{source}: is neither a folder nor an archive ({', '.join(_ARCHIVES)}).")
            shutil.copyfile(source, new / source.name)
        else:
            raise UserError(f"{source}: does not exist. Give a folder of images or an archive.")
    except OSError as error:
        raise UserError(f"{source}: cannot be read or packed ({error}).") from None


def _zip(entries: list[archive.Entry], target: Path) -> None:
    """Pack the entries reproducibly, without compression: names, order, times and modes depend only on the files."""
    with ZipFile(target, "w", ZIP_STORED) as packed:
        for entry in entries:
            assert entry.read
            info = ZipInfo(entry.name, _TIME)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, on every system
            packed.writestr(info, entry.read())


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in folder.rglob("*") if path.is_file()}


def _replace(folder: Path, new: Path, record: Path, old: Path, paths: Paths) -> None:
    """Replace `folder` by `new` and add it to DVC; if DVC fails, restore the previous state."""
    ignored = folder.with_name(".gitignore")
    texts = {file: file.read_bytes() if file.exists() else None for file in (record, ignored)}
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    try:
        dvc.run_dvc(["add", "--quiet", str(folder.relative_to(paths.root))], paths)
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
            present=folder.exists(),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{record}: is not a valid .dvc file ({error!r}). Restore it from git.") from None


@contextmanager
def _locate(reference: str, paths: Paths) -> Iterator[Path]:
    """The path of the content of a data set, while the context is active."""
    name, _, revision = reference.partition("@")
    if Path(reference).exists():
        yield Path(reference)
    elif not _NAME.fullmatch(name):
        raise UserError(
            f"{reference}: does not exist. Give a path, a name listed by `d2r data list`, or NAME@REVISION."
        )
    elif revision:
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, name)
            folder = f"data/raw/{name}"
            try:
                dvc.run_dvc(["get", ".", folder, "--rev", revision, "--out", str(target)], paths)
            except UserError as error:
                raise UserError(
                    f"{reference}: git has no such version of {folder}, or its content is in no cache and no remote. "
                    f"DVC's message: {error}"
                ) from None
            yield target
    elif _folder(name, paths).exists():
        yield _folder(name, paths)
    else:
        known = ", ".join(record.stem for record in sorted(_folder("", paths).glob("*.dvc"))) or "none"
        pull = " It is tracked by DVC: `dvc pull` fetches it." if _folder(f"{name}.dvc", paths).exists() else ""
        raise UserError(f"{reference}: is neither a path nor a data set; the data sets are: {known}.{pull}")


def _hashes(root: Path) -> dict[str, list[str]]:
    """SHA-256 of every file's content -> its names, sorted; the members of zip archives count as files."""
    names_by_hash: dict[str, list[str]] = {}
    with ExitStack() as stack:
        for entry in archive.list_entries(root, stack):
            if entry.read and root.is_dir() and entry.name.lower().endswith(".zip"):
                for digest, names in _hashes(Path(entry.display_name)).items():
                    names_by_hash.setdefault(digest, []).extend(names)
            elif entry.read:
                names_by_hash.setdefault(hashlib.sha256(entry.read()).hexdigest(), []).append(entry.name)
    return {digest: sorted(names) for digest, names in names_by_hash.items()}


def _folders(names: list[str]) -> list[str]:
    """The folders of files with the same content: their splits and classes."""
    return sorted(str(PurePosixPath(name).parent) for name in names)
