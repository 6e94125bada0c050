"""CIFAR-10 and CIFAR-100: from an archive in the original format, downloaded or not, and the real images."""

import hashlib
import http.server
import io
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
from photos import SHARED, load, settings, snapshot

from d2r_core.errors import UserError
from tasks import prepare
from tasks.paths import Paths


def published_archive(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint8]]:
    """A tiny archive in the format of CIFAR-10 or -100 that passes for it; returns its images (N, H, W, 3)."""
    from torchvision import datasets

    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    labels, names = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8) for i in range(2)]
    meta = dataset.meta["filename"]
    contents: dict[str, Any] = {
        "train_part": {"data": pictures[0].reshape(8, 3072), labels: [0, 1] * 4},
        "test_part": {"data": pictures[1].reshape(8, 3072), labels: [1, 0] * 4},
        meta: {names: ["apple", "bear"]},
    }
    files = {file: pickle.dumps(content) for file, content in contents.items()}
    folder.mkdir(parents=True)
    with tarfile.open(folder / dataset.filename, "w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{dataset.base_folder}/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5((folder / dataset.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [["train_part", md5["train_part"]]])
    monkeypatch.setattr(dataset, "test_list", [["test_part", md5["test_part"]]])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5[meta]})
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


def test_cifar_is_downloaded_if_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_archive("cifar10", tmp_path / "server", monkeypatch)
    archive = next((tmp_path / "server").iterdir())
    (tmp_path / "raw").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        try:
            prepare.run(settings(source="cifar10", path="raw", image_size=32), Paths(tmp_path))
        finally:
            server.shutdown()
    assert snapshot(tmp_path / "raw") == {archive.name: archive.read_bytes()}


@pytest.mark.parametrize(
    ("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")]
)
def test_an_unreachable_download_says_where_the_archive_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str
) -> None:
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    (tmp_path / "raw").mkdir()
    archive = re.escape(archive)
    message = (
        rf"{archive}: cannot be downloaded \(.*no route to host.*\)\. Put the archive by hand at .*raw/{archive} \(MD5"
    )
    with pytest.raises(UserError, match=message):
        prepare.run(settings(source=name, path="raw"), Paths(tmp_path))
    assert snapshot(tmp_path) == {"raw": b""}


def test_a_damaged_cifar_archive_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_archive("cifar10", tmp_path / "raw", monkeypatch)
    monkeypatch.undo()  # of the checksums: now the archive is not the published one
    before = snapshot(tmp_path)
    with pytest.raises(
        UserError, match=r"raw/cifar-10-python\.tar\.gz: is not the published archive \(its MD5 is not c58f"
    ):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))
    assert snapshot(tmp_path) == before


def test_cifar_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw: is not a folder\. Make it, or let prepare\.path"):
        prepare.run(settings(source="cifar10", path="raw"), Paths(tmp_path))
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
