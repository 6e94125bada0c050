"""Seeded choices of images, class by class."""

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def hold_out(labels: Index, fraction: float, rng: np.random.Generator) -> tuple[Index, Index]:
    """Split the images in two: those kept, and `fraction` of each class (rounded, at least one) held out.

    Args:
        labels: (N,).

    Returns:
        The positions kept and the positions held out, each ascending; together 0 .. N - 1.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[rng.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def at_most(labels: Index, count: int, rng: np.random.Generator) -> Index:
    """The ascending positions of `count` randomly chosen images of each class, or of all that a class has."""
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
