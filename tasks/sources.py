"""Where images come from: each source as classes and samples, in an order that depends on nothing but their names."""

import http.client
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from d2r_core.errors import UserError
from tasks import image_folder, sampling
from tasks.image_folder import Opener
from tasks.settings import Prepare

_DIGITS_TEST_FRACTION = 0.2
_DOWNLOAD_TIMEOUT = 60.0  # seconds without an answer


class Sample(NamedTuple):
    name: str  # how messages name it
    label: int
    open: Opener


@dataclass(frozen=True)
class Source:
    """Samples that are not decoded yet; `train` and `test` have images of every class."""

    classes: list[str]
    train: list[Sample]
    test: list[Sample]


@contextmanager
def opened(prepare: Prepare, root: Path, rng: np.random.Generator) -> Iterator[Source]:
    """The source that the settings name. Its samples can be opened while the context lasts.

    Args:
        root: what a relative `prepare.path` is relative to.
        rng: cuts the test split of a source that has none of its own (digits).

    Raises:
        UserError: the data is missing, cannot be downloaded, or has another layout than the source's.
    """
    path = root / prepare.path
    match prepare.source:
        case "digits":
            yield _digits(rng)
        case "image_folder":
            with image_folder.opened(path) as found:
                yield _from_folders(path, found)
        case "cifar10" | "cifar100":
            yield _cifar(prepare.source, path)


def _digits(rng: np.random.Generator) -> Source:
    """The 1797 handwritten digits that scikit-learn brings along: 8 x 8, 17 shades of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    samples = [
        Sample(f"digits[{i}]", int(label), partial(Image.fromarray, image))
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True))
    ]
    train, test = sampling.hold_out(digits.target, _DIGITS_TEST_FRACTION, rng)
    return Source([str(name) for name in digits.target_names], [samples[i] for i in train], [samples[i] for i in test])


def _from_folders(path: Path, found: dict[str, dict[str, list[image_folder.Entry]]]) -> Source:
    """A source of a folder or archive; the classes are the sorted folder names."""
    train, test = set(found["train"]), set(found["test"])
    if train != test:
        only = [f"train/{name}/" for name in train - test] + [f"test/{name}/" for name in test - train]
        raise UserError(
            f"{path}: train/ and test/ have different classes: {', '.join(sorted(only))} has no counterpart. "
            "Add images for the other split or remove the class."
        )
    classes = sorted(train)
    if len(classes) < 2:
        raise UserError(f"{path}: has one class only ({classes[0]}); a classifier needs two. Add another class folder.")

    def samples(split: str) -> list[Sample]:
        return [
            Sample(entry.shown, label, entry.open)
            for label, name in enumerate(classes)
            for entry in found[split][name]
            if entry.open
        ]

    return Source(classes, samples("train"), samples("test"))


def _cifar(name: str, folder: Path) -> Source:
    """CIFAR-10 or CIFAR-100 from the published archive in `folder`, downloaded if it is not there.

    The archive holds pickles: none is read before its checksum is found to be the published one.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    archive = folder / dataset.filename
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder. Make it, or let prepare.path (params.yaml) name the one to use.")
    # Within the folder, so that the finished download is moved and not copied; gone afterwards, whatever happens.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacked.") as scratch:
        if not archive.exists():
            _download(dataset, Path(scratch)).replace(archive)
        elif not check_integrity(archive, dataset.tgz_md5):
            raise UserError(
                f"{archive}: is not the published archive (its MD5 is not {dataset.tgz_md5}). Remove it, and it is "
                f"downloaded again, or put a whole copy of {dataset.url} in its place."
            )
        extract_archive(str(archive), scratch)
        train, test = dataset(scratch, train=True), dataset(scratch, train=False)

    def samples(split: str, part: Any) -> list[Sample]:
        return [
            Sample(f"{name} {split}[{i}]", label, partial(Image.fromarray, image))
            for i, (image, label) in enumerate(zip(part.data, part.targets, strict=True))
        ]

    return Source(train.classes, samples("train", train), samples("test", test))


def _download(dataset: Any, folder: Path) -> Path:
    """Fetch the data set's archive into `folder` and check it against the published MD5."""
    from torchvision.datasets.utils import download_url

    archive: Path = folder / dataset.filename
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # else a silent server stops the chain for ever
    try:
        download_url(dataset.url, str(folder), archive.name, dataset.tgz_md5)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"{dataset.url}: cannot be downloaded ({error}). Put the archive by hand at "
            f"{folder.parent / archive.name} (MD5 {dataset.tgz_md5})."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return archive
