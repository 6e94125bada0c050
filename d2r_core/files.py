"""Atomic writes, so that a reader sees the old file or the new one and never a partial one, and hashes of content."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CODE = Path(__file__).parents[1]  # the folder that contains d2r_core


@contextmanager
def atomic(path: Path, *, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if it raises.

    The rename stays within one folder, so it is atomic; the content is flushed to disk first. If `keep` is given, the
    previous file at `path` is moved there instead of being overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(splits: Mapping[str, tuple[tuple[int, ...], Iterable[bytes | memoryview]]]) -> str:
    """SHA-256 over the names, image shapes, labels and pixels of a data set's splits: the `data_hash` of all records.

    Args:
        splits: for each name, the shape (N, 3, H, W) of its images, and the bytes of its labels (little-endian int64)
            followed by those of its images (uint8), in blocks of any size.
    """
    digest = hashlib.sha256()
    for name, (shape, blocks) in sorted(splits.items(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(shape)}".encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def code_fingerprint(*rooms: str) -> str:
    """SHA-256 over the Python source of these folders and files of the project, such as "d2r_core/training"."""
    digest = hashlib.sha256()
    for room in rooms:
        root = CODE / room
        assert root.exists(), f"{room} does not exist"
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(f"{path.relative_to(CODE)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
