"""CIFAR-10 and CIFAR-100 from archives in the original format, local or downloaded, and from the real images."""

import hashlib
import http.server
import io
import os
import pickle
import re
import tarfile
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from photos import load, settings, snapshot
from project import SHARED

from d2r_core.errors import UserError
from tasks import prepare
from tasks.config.paths import Paths
from tasks.data import cifar


def published_archive(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **replaced: Any
) -> list[NDArray[np.uint8]]:
    """Write a tiny archive in the format of CIFAR-10 or -100 and accept its checksum; return its images (N, H, W, 3).

    Args:
        replaced: content of single members; None omits the member.
    """
    published = cifar.PUBLISHED[name]._replace(train=("batches/train",), test=("batches/test",), meta="batches/meta")
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8) for i in range(2)]
    contents: dict[str, Any] = {
        "train": {"data": pictures[0].reshape(8, 3072), published.labels: [0, 1] * 4},
        "test": {"data": pictures[1].reshape(8, 3072), published.labels: [1, 0] * 4},
        "meta": {published.classes: ["apple", "bear"]},
        "readme.html": "not read",
    } | replaced
    folder.mkdir(parents=True)
    archive = folder / Path(published.url).name
    with tarfile.open(archive, "w:gz") as target:
        for member, content in contents.items():
            if content is not None:
                pickled = pickle.dumps(content, protocol=3)
                info = tarfile.TarInfo(f"batches/{member}")
                info.size = len(pickled)
                target.addfile(info, io.BytesIO(pickled))
    published = published._replace(md5=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(cifar.PUBLISHED, name, published)
    return [picture.transpose(0, 2, 3, 1) for picture in pictures]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pictures = published_archive(name, tmp_path / "raw", monkeypatch)
    before = snapshot(tmp_path / "raw")
    manifest = prepare.run(settings(source=name, path="raw", image_size=32), Paths(tmp_path))
    assert manifest["source"] == name
    assert manifest["classes"] == ["apple", "bear"]
    assert [split["per_class"] for split in manifest["splits"].values()] == [[3, 3], [1, 1], [4, 4]]
    assert not any(manifest["converted"].values())
    test = load(Paths(tmp_path))["test"]
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), pictures[1])
    assert test.labels.tolist() == [1, 0] * 4
    assert snapshot(tmp_path / "raw") == before
    archive = next((tmp_path / "raw").iterdir())
    again = prepare.run(settings(source=name, path=f"raw/{archive.name}", image_size=32), Paths(tmp_path))
    assert again["hash"] == manifest["hash"]


def test_cifar_is_downloaded_if_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_archive("cifar10", tmp_path / "server", monkeypatch)
    archive = next((tmp_path / "server").iterdir())
    (tmp_path / "raw").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setitem(cifar.PUBLISHED, "cifar10", cifar.PUBLISHED["cifar10"]._replace(url=url))
        try:
            prepare.run(settings(source="cifar10", path="raw", image_size=32), Paths(tmp_path))
        finally:
            server.shutdown()
    assert snapshot(tmp_path / "raw") == {archive.name: archive.read_bytes()}


@pytest.mark.parametrize(
    ("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")]
)
def test_a_failed_download_names_the_path_of_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str
) -> None:
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    (tmp_path / "raw").mkdir()
    archive = re.escape(archive)
    message = (
        rf"{archive}: cannot be downloaded \(.*no route to host.*\)\. Download it manually to .*raw/{archive} \(MD5"
    )
    with pytest.raises(UserError, match=message):
        prepare.run(settings(source=name, path="raw"), Paths(tmp_path))
    assert snapshot(tmp_path) == {"raw": b""}


class Evil:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_an_archive_with_another_checksum_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    published_archive("cifar10", tmp_path / "raw", monkeypatch, train=Evil(mark))
    monkeypatch.undo()  # of the checksum: now the archive is not the published one
    before = snapshot(tmp_path)
    with pytest.raises(
        UserError, match=r"raw/cifar-10-python\.tar\.gz: is not the published archive \(its MD5 is \w+, not c58f"
    ):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))
    assert snapshot(tmp_path) == before


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"train": Evil(Path("mark"))}, r"a pickle refers to (posix|nt)\.mkdir, which is not allowed"),
    "missing_member": ({"test": None}, r"'batches/test'"),
    "missing_key": ({"train": {"data": np.zeros((2, 3072), np.uint8)}}, r"'labels'"),
    "floats": ({"train": {"data": np.zeros((2, 3072)), "labels": [0, 1]}}, r"batches/train has float64 images or"),
    "unknown_label": (
        {"test": {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}},
        r"batches/test has uint8 images or labels outside 0 to 1",
    ),
    "fewer_labels": ({"test": {"data": np.zeros((2, 3072), np.uint8), "labels": [0]}}, r"cannot reshape"),
    "no_mapping": ({"train": [1, 2]}, r"list indices"),
}


@pytest.mark.parametrize(("replaced", "message"), WRONG.values(), ids=WRONG.keys())
def test_even_with_the_right_checksum_an_archive_may_contain_only_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    published_archive("cifar10", tmp_path / "raw", monkeypatch, **replaced)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=rf"cifar-10-python\.tar\.gz: is not in the format of cifar10 \(.*{message}"):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))
    assert snapshot(tmp_path) == before


def test_a_truncated_archive_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_archive("cifar10", tmp_path / "raw", monkeypatch)
    archive = next((tmp_path / "raw").iterdir())
    archive.write_bytes(archive.read_bytes()[:-2000])
    whole = cifar.PUBLISHED["cifar10"]
    with pytest.raises(UserError, match=r"is not the published archive"):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", whole._replace(md5=md5))
    with pytest.raises(UserError, match=r"is not in the format of cifar10 \(.*end.*\)\. Replace it by a copy of https"):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))


def test_cifar_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw/cifar: does not exist\. Create the folder, or set prepare\.path"):
        prepare.run(settings(source="cifar10", path="raw/cifar"), Paths(tmp_path))
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(not (SHARED / "cifar10-test.zip").exists(), reason=f"the CIFAR-10 archives are not in {SHARED}")
def test_real_cifar_from_three_archives(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for archive in SHARED.glob("cifar10-*.zip"):
        (raw / archive.name).symlink_to(archive)
    limits: dict[str, Any] = {"validation_fraction": 0.01, "train_per_class": 200, "test_per_class": 100}
    manifest = prepare.run(settings(path="raw", image_size=32, on_mismatch="refuse", **limits), Paths(tmp_path))
    assert manifest["classes"] == [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    ]  # fmt: skip
    assert [split["per_class"] for split in manifest["splits"].values()] == [[200] * 10, [50] * 10, [100] * 10]
    assert not any(manifest["converted"].values())
    # Photographs: the channels of the training images lie near the published means of CIFAR-10.
    means = load(Paths(tmp_path))["train"].images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.491, 0.482, 0.447]), atol=0.02)
