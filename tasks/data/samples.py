"""What every source of images comes to: classes, and samples that are not decoded yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from tasks.data import splitting


class Sample(NamedTuple):
    name: str  # where it came from, for messages
    label: int
    open: Callable[[], Image.Image]  # threads may open different samples at the same time


@dataclass(frozen=True)
class Source:
    """`train` and `test` have images of every class."""

    classes: list[str]
    train: list[Sample]
    test: list[Sample]
    grey: bool = False  # grey images belong to it: converted, whatever prepare.on_mismatch says


def cut(classes: list[str], samples: list[Sample], fraction: float, rng: np.random.Generator) -> Source:
    """A source without a test split of its own: `fraction` of each class becomes one."""
    train, test = splitting.hold_out(labels(samples), fraction, rng)
    return Source(classes, [samples[i] for i in train], [samples[i] for i in test])


def labels(samples: list[Sample]) -> splitting.Index:
    """The labels, int64 (N,)."""
    return np.array([sample.label for sample in samples], dtype=np.int64)
