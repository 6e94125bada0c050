"""A version is served from data: nothing is unpickled, and images that cannot be classified get one sentence."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow_server import model_server
from project import settings_from
from registry_project import CLASSES, NAME, Project, images, logged_model_folder, logits, make_project

from d2r_core import checkpoint
from d2r_core.errors import UserError
from tasks.config.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def target_logits(project: Project, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    model, _ = checkpoint.load(project.paths.target, torch.device("cpu"))
    return logits(model, x)


class Bomb:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._marker),)


def plant(path: Path, content: bytes) -> None:
    """Replace the file, or what is in it where it is an archive, by `content`."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(content)
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, original in members.items():
            archive.writestr(name, content if name.endswith((".pt", ".pkl")) else original)


def error_of_loading() -> Exception | None:
    try:
        mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")
    except Exception as error:  # MLflow's own, or that of a parser
        return error
    return None


@pytest.mark.filterwarnings("ignore")  # MLflow warns about the requirements that it cannot read
@pytest.mark.parametrize("protocol", [0, 2])  # 0 is ASCII: text is read in some of the files
def test_no_pickle_in_an_entry_is_run(project: Project, tmp_path: Path, protocol: int) -> None:
    folder = logged_model_folder(project.version(project.register()))
    marker = tmp_path / "ran"
    content = pickle.dumps(Bomb(marker), protocol)
    pickle.loads(content)
    marker.rmdir()  # it works

    present = [path for path in folder.rglob("*") if path.is_file()]
    added = [folder / name for name in ("python_model.pkl", "data/model.pkl", "data/model/target.pt", "model.pth")]
    for path in (*present, *added):
        original = path.read_bytes() if path.exists() else None
        plant(path, content)
        error = error_of_loading()
        if path.is_relative_to(folder / "data"):
            assert isinstance(error, UserError)
            assert str(path.relative_to(folder)) in str(error)
        else:
            assert error or path.name == "registered_model_meta"  # which MLflow overwrites
        assert not marker.exists(), path
        path.unlink()
        if original is not None:
            path.write_bytes(original)
    mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")


def test_entry_gives_the_checkpoints_answers(project: Project) -> None:
    project.register()
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")
    for x in (images(1), images(7).astype(np.float64), images(300)):
        expected = target_logits(project, x.astype(np.float32))
        rows = served.predict(x, params={"logits": True})
        assert list(rows) == ["label", "probabilities", "logits"]
        np.testing.assert_allclose(np.stack(rows["logits"]), expected, rtol=1e-5, atol=1e-5)
        probabilities = torch.from_numpy(expected).softmax(1)
        np.testing.assert_allclose(np.stack(rows["probabilities"]), probabilities, rtol=1e-5, atol=1e-5)
        assert list(rows["label"]) == [CLASSES[index] for index in expected.argmax(1)]
    assert list(served.predict(images(1))) == ["label", "probabilities"]

    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    rows = served.predict(pixels, params={"logits": True})
    expected = target_logits(project, pixels.astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(np.stack(rows["logits"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(2)[0], r"must have the shape \(N, 3, 16, 16\), and these have \(3, 16, 16\)"),
        (images(2)[:, :1], r"these have \(2, 1, 16, 16\)"),
        (images(2)[:0], r"these have \(0, 3, 16, 16\)"),
        (images(2) * 255, "must be floats in .* and these are floats from"),
        (-images(2), "must be floats in"),
        (np.full((1, 3, 16, 16), 256), "whole numbers from 256 to 256"),
        (np.full((1, 3, 16, 16), np.nan), "NaN or infinity"),
        (np.full((1, 3, 16, 16), np.inf), "NaN or infinity"),
        (np.full((1, 3, 16, 16), None), "array of numbers, and these are object"),
        (np.zeros((1025, 3, 16, 16), np.uint8), "takes 1024 images at most, and this one has 1025"),
    ],
)
def test_images_that_cannot_be_classified_are_refused(served: Any, x: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message) as error:
        served.predict(x)
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"  # which the server turns into 400


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Iterator[Any]:
    """A loaded model that the tests of its input share."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("served")
        project = make_project(folder, tmp_path_factory, lambda **changes: settings_from(tiny_values, **changes), patch)
        project.register()
        yield mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")


def test_model_is_served_over_http(project: Project) -> None:
    project.register()
    with model_server(f"models:/{NAME}@challenger") as client:
        for x in (images(1), images(3)):
            response = client.post("/invocations", json={"inputs": x.tolist(), "params": {"logits": True}})
            rows = response.json()["predictions"]
            expected = target_logits(project, x)
            np.testing.assert_allclose([row["logits"] for row in rows], expected, rtol=1e-5, atol=1e-5)
            assert [row["label"] for row in rows] == [CLASSES[index] for index in expected.argmax(1)]
        pixels = (images(2) * 255).astype(np.uint8)
        response = client.post("/invocations", json={"inputs": pixels.tolist()})
        (row, _) = response.json()["predictions"]
        assert set(row) == {"label", "probabilities"}
        first = torch.from_numpy(target_logits(project, pixels.astype(np.float32) / np.float32(255))).softmax(1)[0]
        np.testing.assert_allclose(row["probabilities"], first, rtol=1e-5, atol=1e-5)

        refused: list[tuple[npt.NDArray[Any], str]] = [
            (images(2)[0], "Images must have the shape (N, 3, 16, 16), and these have (3, 16, 16)."),
            (images(1) * 255, "Images must be floats in [0, 1] or whole numbers from 0 to 255, and these are floats"),
            (np.full((1, 3, 16, 16), np.nan), "Images must not contain NaN or infinity."),
            (np.full((1, 3, 16, 16), -np.inf), "Images must not contain NaN or infinity."),
            (np.full((1, 3, 16, 16), None), "Images must be an array of numbers, and these are object."),
            (np.zeros((1025, 3, 16, 16), np.uint8), "One request takes 1024 images at most, and this one has 1025."),
        ]
        for batch, message in refused:
            response = client.post(
                "/invocations",
                content=json.dumps({"inputs": batch.tolist()}),
                headers={"Content-Type": "application/json"},
            )
            assert response.status_code == 400
            assert response.json()["message"].startswith(message)
            assert "\n" not in response.json()["message"]
