"""Opens any image source as classes and samples, in an order that depends only on their names."""

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
def open_source(prepare: Prepare, root: Path, rng: np.random.Generator) -> Iterator[Source]:
    """The source of the settings. Its samples can be opened while the context is active.

    Args:
        root: base folder of a relative `prepare.path`.
        rng: draws the test split of a source that has none of its own.

    Raises:
        UserError: the data are missing, cannot be downloaded, are unsafe to read, or do not have the source's layout.
    """
    path = root / prepare.path
    match prepare.source:
        case "digits":
            yield _digits(prepare.test_fraction, rng)
        case "image_folder":
            with image_folder.open_source(path, prepare.test_fraction, rng) as source:
                yield source
        case "tiny_imagenet":
            with tiny_imagenet.open_source(path) as source:
                yield source
        case "cifar10" | "cifar100":
            yield cifar.load(prepare.source, path)


def _digits(test_fraction: float, rng: np.random.Generator) -> Source:
    """The 1797 handwritten digits that come with scikit-learn: 8 x 8, 17 shades of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    all_samples = [
        Sample(f"digits[{i}]", int(label), partial(Image.fromarray, image))
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True))
    ]
    return samples.with_test_split([str(name) for name in digits.target_names], all_samples, test_fraction, rng)
