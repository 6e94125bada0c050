"""CIFAR-10 and CIFAR-100 from the published archives, which contain pickles.

An archive is opened only if its checksum is the published one, and even then its pickles can build nothing but arrays,
lists, dictionaries, numbers and text. Nothing is extracted to disk.
"""

import hashlib
import http.client
import pickle
import socket
import tarfile
import tempfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from d2r_core.errors import UserError
from tasks.data.samples import Sample, Source

_DOWNLOAD_TIMEOUT = 60.0  # seconds without a response


class Published(NamedTuple):
    url: str
    md5: str
    train: tuple[str, ...]  # members of the archive
    test: tuple[str, ...]
    meta: str  # the member with the class names
    classes: str  # the key of the class names in `meta`
    labels: str  # the key of the labels in the other members


PUBLISHED = {
    "cifar10": Published(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        ("cifar-10-batches-py/test_batch",),
        "cifar-10-batches-py/batches.meta",
        "label_names",
        "labels",
    ),
    "cifar100": Published(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("cifar-100-python/train",),
        ("cifar-100-python/test",),
        "cifar-100-python/meta",
        "fine_label_names",
        "fine_labels",
    ),
}


def load(name: str, path: Path) -> Source:
    """Read `cifar10` or `cifar100`.

    Args:
        path: the archive, or the folder that contains it or that it is downloaded to.

    Raises:
        UserError: the archive is not the published one, or is missing and cannot be downloaded.
    """
    published = PUBLISHED[name]
    archive = path / Path(published.url).name if path.is_dir() else path
    if not archive.parent.is_dir():
        raise UserError(f"{path}: does not exist. Create the folder, or set prepare.path (params.yaml) to another one.")
    if not archive.exists():
        _download(published, archive)
    else:
        _check(published, archive)
    try:
        contents = _contents(archive, {*published.train, *published.test, published.meta})
        classes = [str(label) for label in contents[published.meta][published.classes]]
        train = _samples(contents, published.train, published.labels, len(classes))
        test = _samples(contents, published.test, published.labels, len(classes))
    except (
        tarfile.TarError,
        zlib.error,
        EOFError,
        pickle.UnpicklingError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{archive}: is not in the format of {name} ({error}). Replace it by a copy of {published.url}."
        ) from None
    return Source(classes, train, test)


def _check(published: Published, archive: Path) -> None:
    with archive.open("rb") as file:
        md5 = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if md5 != published.md5:
        raise UserError(
            f"{archive}: is not the published archive (its MD5 is {md5}, not {published.md5}). Remove it to download "
            f"it again, or replace it by a complete copy of {published.url}."
        )


def _contents(archive: Path, names: set[str]) -> dict[str, Any]:
    """The unpickled content of the named members of the archive."""
    contents = {}
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.name in names and (file := members.extractfile(member)):
                contents[member.name] = _ArrayUnpickler(file, encoding="latin1").load()
    return contents


class _ArrayUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, text, numbers and arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return np.empty(0).__reduce__()[0]
            case "numpy", ("ndarray" | "dtype"):
                return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle refers to {module}.{name}, which is not allowed")


def _samples(contents: dict[str, Any], members: tuple[str, ...], key: str, classes: int) -> list[Sample]:
    samples = []
    for member in members:
        images, labels = np.asarray(contents[member]["data"]), contents[member][key]
        if images.dtype != np.uint8 or not set(labels) <= set(range(classes)):
            raise ValueError(f"{member} has {images.dtype} images or labels outside 0 to {classes - 1}")
        images = images.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        samples += [
            Sample(f"{member}[{i}]", label, partial(Image.fromarray, image))
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
    return samples


def _download(published: Published, archive: Path) -> None:
    """Download the archive and check its MD5; it is moved to its path only when it is complete."""
    from torchvision.datasets.utils import download_url

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # or an unresponsive server would block the pipeline for ever
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".download.") as folder:
            download_url(published.url, folder, archive.name, published.md5)
            Path(folder, archive.name).replace(archive)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"{published.url}: cannot be downloaded ({error}). Download it manually to {archive} (MD5 {published.md5})."
        ) from None
    finally:
        socket.setdefaulttimeout(previous)
