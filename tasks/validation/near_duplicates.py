"""Near-duplicates: images that look the same and differ in their pixels (resized, recompressed, brighter, darker).

The hash is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the signs,
around their median, of the 8 x 8 lowest frequencies of a grey 32 x 32 thumbnail. Mirrored, rotated or cropped copies
have other hashes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DISTANCE = 6  # of the 64 bits; unrelated images differ in about 32, the closest of 50,000 in 12 to 16
MIN_CORRELATION = 0.9  # of the thumbnails: 64 bits are few, and plain images share them by chance
_SIDE = 32  # of the thumbnail that is hashed
_FREQUENCIES = 8
_COMPARED_SIDE = 16  # of the colour thumbnails that are correlated
_CHUNK = 256  # images in floating point at once
_BLOCK = 64  # images that are compared with all others at once

Hashes = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]


def perceptual_hash(images: Tensor) -> Hashes:
    """The 64-bit hash of each image, uint64 (N,), of images uint8 (N, 3, H, W)."""
    frequency = torch.arange(_FREQUENCIES)[:, None]
    basis = torch.cos(math.pi / _SIDE * (torch.arange(_SIDE) + 0.5) * frequency)
    bits = np.empty((len(images), _FREQUENCIES**2), dtype=bool)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        grey = F.adaptive_avg_pool2d(chunk.float().mean(1), _SIDE)
        spectrum = (basis @ grey @ basis.T).flatten(1)
        bits[start : start + len(chunk)] = spectrum > spectrum.median(1, keepdim=True).values
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def closest(queries: Hashes, references: Hashes) -> tuple[npt.NDArray[np.uint8], Index]:
    """For each query, the distance in bits to its closest reference (of which there must be one), and its position."""
    distances = np.empty(len(queries), dtype=np.uint8)
    positions = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        apart = np.bitwise_count(queries[block, None] ^ references[None])
        positions[block] = apart.argmin(1)
        distances[block] = apart[np.arange(len(apart)), positions[block]]
    return distances, positions


def near(parts: Sequence[Tensor]) -> Index:
    """For each image the row of one in an earlier part that looks the same, or -1.

    Compares the hashes of all pairs: 10,000 images against 50,000 take about a second.

    Args:
        parts: images uint8 (N, 3, H, W); their rows count through all of them.

    Returns:
        int64 (sum of all N,); -1 throughout the first part.
    """
    hashes = [perceptual_hash(images) for images in parts]
    found = [np.full(len(part), -1) for part in hashes]
    for number in range(1, len(parts)):
        earlier = np.concatenate(hashes[:number])
        if not len(earlier):
            continue
        distances, rows = closest(hashes[number], earlier)
        candidates = np.flatnonzero(distances <= MAX_DISTANCE)
        alike = _correlation(parts[number][candidates], _take(parts, rows[candidates])) >= MIN_CORRELATION
        found[number][candidates[alike]] = rows[candidates[alike]]
    return np.concatenate(found)


def _correlation(images: Iterable[Tensor], others: Iterable[Tensor]) -> npt.NDArray[np.float32]:
    """Between -1 and 1, of each image with its other one, over the colours of their thumbnails."""
    pairs = zip(images, others, strict=True)
    return np.array([F.cosine_similarity(_centred(a), _centred(b), dim=0) for a, b in pairs], dtype=np.float32)


def _take(parts: Sequence[Tensor], rows: Index) -> Iterator[Tensor]:
    starts = np.cumsum([0, *map(len, parts)])
    for row in rows.tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        yield parts[number][row - int(starts[number])]


def _centred(image: Tensor) -> Tensor:
    flat = F.adaptive_avg_pool2d(image.float(), _COMPARED_SIDE).flatten()
    return flat - flat.mean()
