"""Where images come from: each source as classes and samples, in an order that depends on nothing but their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.config.settings import Prepare
from tasks.data import cifar, image_folder, samples, tiny_imagenet
from tasks.data.samples import Sample, Source


@contextmanager
def opened(prepare: Prepare, root: Path, rng: np.random.Generator) -> Iterator[Source]:
    """The source that the settings name. Its samples can be opened while the context lasts.

    Args:
        root: what a relative `prepare.path` is relative to.
        rng: cuts the test split of a source that has none of its own.

    Raises:
        UserError: the data is missing, cannot be downloaded or trusted, or has another layout than the source's.
    """
    path = root / prepare.path
    match prepare.source:
        case "digits":
            yield _digits(prepare.test_fraction, rng)
        case "image_folder":
            with image_folder.opened(path, prepare.test_fraction, rng) as source:
                yield source
        case "tiny_imagenet":
            with tiny_imagenet.opened(path) as source:
                yield source
        case "cifar10" | "cifar100":
            yield cifar.load(prepare.source, path)


def _digits(test_fraction: float, rng: np.random.Generator) -> Source:
    """The 1797 handwritten digits that scikit-learn brings along: 8 x 8, 17 shades of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    found = [
        Sample(f"digits[{i}]", int(label), partial(Image.fromarray, image))
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True))
    ]
    return samples.cut([str(name) for name in digits.target_names], found, test_fraction, rng)
