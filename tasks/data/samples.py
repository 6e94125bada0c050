"""The common form of all image sources: class names, and samples that are not decoded yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from tasks.data import splitting


class Sample(NamedTuple):
    name: str  # origin of the image, for messages
    label: int
    open: Callable[[], Image.Image]  # different samples may be opened from several threads


@dataclass(frozen=True)
class Source:
    """Class names and samples; `train` and `test` have images of every class."""

    classes: list[str]
    train: list[Sample]
    test: list[Sample]
    grey: bool = False  # grey images are part of the data set: converted, whatever prepare.on_mismatch is


def with_test_split(classes: list[str], samples: list[Sample], fraction: float, rng: np.random.Generator) -> Source:
    """A source that has no test split of its own: `fraction` of each class becomes the test split."""
    train, test = splitting.hold_out(labels(samples), fraction, rng)
    return Source(classes, [samples[i] for i in train], [samples[i] for i in test])


def labels(samples: list[Sample]) -> splitting.Index:
    """The labels, int64 (N,)."""
    return np.array([sample.label for sample in samples], dtype=np.int64)
