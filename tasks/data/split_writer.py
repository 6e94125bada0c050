"""Writes prepared splits as a stream, so that memory does not grow with their size; d2r_core/data.py reads them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from d2r_core import files

_HEADER = 512  # bytes, at least
_BLOCK = 2**20


def write(path: Path, rows: Iterable[tuple[NDArray[np.uint8], int]], *, size: int, max_rows: int) -> NDArray[np.int64]:
    """Write images uint8 (3, size, size), each with its label, to a safetensors file as they come.

    Args:
        max_rows: upper bound on the number of rows.

    Returns:
        The labels (N,).
    """
    # The header holds the number of rows, which is only known at the end. So the images start behind the space that the
    # longest header and `max_rows` labels would need; the header is padded with spaces.
    first_image = _HEADER + 8 * max_rows
    labels = []
    with path.open("wb") as file:
        file.seek(first_image)
        for pixels, label in rows:
            file.write(pixels.data)
            labels.append(label)
        count = len(labels)
        assert count <= max_rows
        labels_end = 8 * count
        images_end = labels_end + file.tell() - first_image
        header = {
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, labels_end]},
            "images": {"dtype": "U8", "shape": [count, 3, size, size], "data_offsets": [labels_end, images_end]},
        }
        length = first_image - labels_end - 8
        file.seek(0)
        file.write(length.to_bytes(8, "little") + json.dumps(header).encode().ljust(length))
        stored = np.array(labels, dtype="<i8")
        file.write(stored.data)
    return stored


def content_hash(paths: Mapping[str, Path]) -> str:
    """`files.content_hash` of the splits in the files that `write` made, by name, read block by block."""
    with ExitStack() as stack:
        opened = {name: stack.enter_context(path.open("rb")) for name, path in paths.items()}
        # After the header come the labels, then the images.
        return files.content_hash(
            {name: (tuple(_header(file)["images"]["shape"]), _blocks(file)) for name, file in opened.items()}
        )


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _header(file: BinaryIO) -> dict[str, dict[str, list[int]]]:
    content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert isinstance(content, dict)
    return content
