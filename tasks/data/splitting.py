"""Seeded selection of images within each class."""

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def hold_out(labels: Index, fraction: float, rng: np.random.Generator) -> tuple[Index, Index]:
    """Hold out `fraction` of each class (rounded, at least one image).

    Args:
        labels: (N,).

    Returns:
        The remaining and the held-out positions, each ascending; together 0 .. N - 1.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[rng.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def limit_per_class(labels: Index, count: int, rng: np.random.Generator) -> Index:
    """The ascending positions of `count` random images of each class, or of all images of a smaller class."""
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
