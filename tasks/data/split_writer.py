"""Prepared splits written and hashed as a stream, whatever their size; d2r_core/data.py reads them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_HEADER = 512  # bytes, at least
_BLOCK = 2**20


def write(path: Path, rows: Iterable[tuple[NDArray[np.uint8], int]], *, size: int, most: int) -> NDArray[np.int64]:
    """Write images uint8 (3, size, size), each with its label, to a safetensors file as they come.

    Args:
        most: no more rows than this.

    Returns:
        The labels (N,).
    """
    # The header names the number of rows, which is known at the end, so the images begin where the longest header and
    # the labels of all would end; spaces fill what is too much.
    first = _HEADER + 8 * most
    labels = []
    with path.open("wb") as file:
        file.seek(first)
        for pixels, label in rows:
            file.write(pixels.data)
            labels.append(label)
        assert len(labels) <= most
        count, middle, end = len(labels), 8 * len(labels), file.tell() - first + 8 * len(labels)
        header = {
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, middle]},
            "images": {"dtype": "U8", "shape": [count, 3, size, size], "data_offsets": [middle, end]},
        }
        length = first - middle - 8
        file.seek(0)
        file.write(length.to_bytes(8, "little") + json.dumps(header).encode().ljust(length))
        stored = np.array(labels, dtype="<i8")
        file.write(stored.data)
    return stored


def content_hash(files: Mapping[str, Path]) -> str:
    """What d2r_core.data.content_hash says of the splits in these files, by name, read block by block."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name} {tuple(_header(file)['images']['shape'])}".encode())
            while block := file.read(_BLOCK):  # the labels, then the images
                digest.update(block)
    return digest.hexdigest()


def _header(file: BinaryIO) -> dict[str, dict[str, list[int]]]:
    content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert isinstance(content, dict)
    return content
