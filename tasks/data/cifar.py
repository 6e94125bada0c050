"""CIFAR-10 and CIFAR-100 from the published archives, which hold pickles.

No byte of them is looked at before the archive's checksum is found to be the published one, and even then the pickles
can make arrays, lists and text only. Nothing is extracted to the disk.
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

_DOWNLOAD_TIMEOUT = 60.0  # seconds without an answer


class Published(NamedTuple):
    url: str
    md5: str
    train: tuple[str, ...]  # members of the archive
    test: tuple[str, ...]
    meta: str  # the member that names the classes
    classes: str  # its key for them
    labels: str  # the key for the labels in the others


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
        path: the archive, or the folder where it lies or is downloaded to.

    Raises:
        UserError: the archive is not the published one, or is not there and cannot be downloaded.
    """
    published = PUBLISHED[name]
    archive = path / Path(published.url).name if path.is_dir() else path
    if not archive.parent.is_dir():
        raise UserError(f"{path}: does not exist. Make the folder, or let prepare.path (params.yaml) name another one.")
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
            f"{archive}: is not in the format of {name} ({error}). Put a copy of {published.url} there."
        ) from None
    return Source(classes, train, test)


def _check(published: Published, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if found != published.md5:
        raise UserError(
            f"{archive}: is not the published archive (its MD5 is {found}, not {published.md5}). Remove it, and it is "
            f"downloaded again, or put a whole copy of {published.url} in its place."
        )


def _contents(archive: Path, wanted: set[str]) -> dict[str, Any]:
    """What the wanted members of the archive hold, by name."""
    contents = {}
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.name in wanted and (file := members.extractfile(member)):
                contents[member.name] = _Arrays(file, encoding="latin1").load()
    return contents


class _Arrays(pickle.Unpickler):
    """Can build lists, dictionaries, text, numbers and arrays, and call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return np.empty(0).__reduce__()[0]
            case "numpy", ("ndarray" | "dtype"):
                return getattr(np, name)
        raise pickle.UnpicklingError(f"a pickle asks for {module}.{name}, which no image needs")


def _samples(contents: dict[str, Any], members: tuple[str, ...], key: str, classes: int) -> list[Sample]:
    samples = []
    for member in members:
        images, labels = np.asarray(contents[member]["data"]), contents[member][key]
        if images.dtype != np.uint8 or not set(labels) <= set(range(classes)):
            raise ValueError(f"{member} holds {images.dtype} images or labels beyond 0 to {classes - 1}")
        images = images.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        samples += [
            Sample(f"{member}[{i}]", label, partial(Image.fromarray, image))
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
    return samples


def _download(published: Published, archive: Path) -> None:
    """Fetch the archive and check it against the published MD5; it appears in its place as a whole or not at all."""
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # else a silent server stops the chain for ever
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".download.") as folder:
            download_url(published.url, folder, archive.name, published.md5)
            Path(folder, archive.name).replace(archive)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"{published.url}: cannot be downloaded ({error}). Put the archive by hand at {archive} "
            f"(MD5 {published.md5})."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
