"""Near-duplicates: images that look the same but have other pixels (resized, recompressed, brighter or darker copies).

The hash is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the signs,
around their median, of the 8 x 8 lowest frequencies of a grey 32 x 32 thumbnail. Mirrored, rotated or cropped copies
have other hashes and are not found.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DISTANCE = 6  # in bits of 64; unrelated images differ in about 32, the closest of 50,000 in 12 to 16
MIN_CORRELATION = 0.9  # of the thumbnails, since images with little structure can share a 64-bit hash by chance
_SIDE = 32  # of the thumbnail that is hashed
_FREQUENCIES = 8
_COMPARED_SIDE = 16  # of the colour thumbnails that are correlated
_CHUNK = 256  # images in floating point at once
_BLOCK = 64  # images compared with all others at once

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
    """For each query, the distance in bits to its closest reference, and the position of that; needs a reference."""
    distances = np.empty(len(queries), dtype=np.uint8)
    positions = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        pairwise = np.bitwise_count(queries[block, None] ^ references[None])
        positions[block] = pairwise.argmin(1)
        distances[block] = pairwise[np.arange(len(pairwise)), positions[block]]
    return distances, positions


def find_near_duplicates(parts: Sequence[Tensor]) -> Index:
    """For each image, the row of a near-duplicate in an earlier part, or -1.

    Compares the hashes of all pairs: 10,000 images against 50,000 take about a second.

    Args:
        parts: images uint8 (N, 3, H, W); rows are numbered through all parts.

    Returns:
        int64 (sum of all N,); -1 throughout the first part.
    """
    hashes = [perceptual_hash(images) for images in parts]
    matches = [np.full(len(part), -1) for part in hashes]
    for number in range(1, len(parts)):
        earlier = np.concatenate(hashes[:number])
        if not len(earlier):
            continue
        distances, rows = closest(hashes[number], earlier)
        candidates = np.flatnonzero(distances <= MAX_DISTANCE)
        similar = _correlation(parts[number][candidates], _take(parts, rows[candidates])) >= MIN_CORRELATION
        matches[number][candidates[similar]] = rows[candidates[similar]]
    return np.concatenate(matches)


def _correlation(images: Iterable[Tensor], others: Iterable[Tensor]) -> npt.NDArray[np.float32]:
    """Of each pair of images, between -1 and 1, over the colours of their thumbnails."""
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
