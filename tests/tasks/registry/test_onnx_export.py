"""The exported ONNX model: the logits of the trained one for any number of images, or one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from registry_project import NAME, make_project
from safetensors.torch import load_file, save_file
from torch import nn

from d2r_core import checkpoint, data, models
from d2r_core.data import Split
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import onnx_export, recorded_examples, versions

pytestmark = pytest.mark.slow

CLASSES = ["nought", 'the "one"', "zwei, drei"]


def record(folder: Path, model: nn.Module, size: int) -> Path:
    """A folder with the recorded examples of a model that takes images of `size` pixels."""
    paths = Paths(folder)
    images = torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8)
    data.save_split(paths.prepared / "test.safetensors", Split(images, torch.arange(20) % 3))
    recorded_examples.write(paths, model, folder)
    return folder


def trained(size: int, **architecture: Any) -> nn.Module:
    """A model whose BatchNorm has seen images, in eval mode."""
    torch.manual_seed(0)
    model = models.build(num_classes=len(CLASSES), image_size=size, **architecture).train()
    with torch.no_grad():
        model(torch.rand(64, 3, size, size))
    return model.eval()


@pytest.mark.parametrize(
    ("size", "architecture"),
    [
        (16, {"name": "wide_resnet", "depth": 10, "widen_factor": 1}),
        (32, {"name": "wide_resnet", "depth": 10, "widen_factor": 2}),  # the published pooling
        (16, {"name": "preact_resnet18"}),  # Winograd's convolutions in PyTorch
        (16, {"name": "resnet18", "width": 4, "strides": [1, 2, 2, 2]}),
    ],
)
def test_onnx_runtime_gives_the_logits_of_the_model(tmp_path: Path, size: int, architecture: dict[str, Any]) -> None:
    model = trained(size, **architecture)
    onnx_export.write(model, CLASSES, record(tmp_path, model, size))

    session = onnxruntime.InferenceSession(tmp_path / "target.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    (described,) = session.get_inputs()
    assert (described.name, described.type, described.shape[1:]) == ("images", "tensor(float)", [3, size, size])
    for count in (1, 3, 40):
        images = np.random.default_rng(count).random((count, 3, size, size), dtype=np.float32)
        (logits,) = session.run(["logits"], {"images": images})
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_other_logits_than_those_of_the_model_are_refused(tmp_path: Path) -> None:
    model = trained(16, name="wide_resnet", depth=10, widen_factor=1)
    path = record(tmp_path, model, 16) / recorded_examples.FILE
    recorded = load_file(path)
    recorded["logits"][3, 1] += 1e-4
    save_file(recorded, path)

    with pytest.raises(UserError, match=r"off by up to 0\.0001, .* nothing is registered.*promote\.onnx"):
        onnx_export.write(model, CLASSES, tmp_path)


class DataDependent(nn.Module):
    """Takes another path for some images, which no graph can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] if bool(x.mean() > 2) else x.flatten(1)[:, 3:6]


def test_a_model_that_cannot_be_exported_is_one_message(tmp_path: Path) -> None:
    model = DataDependent().eval()
    with pytest.raises(
        UserError, match=r"cannot be exported to ONNX \(.*data-dependent.*\), so nothing is registered"
    ) as error:
        onnx_export.write(model, CLASSES, record(tmp_path, model, 16))
    assert "\n" not in str(error.value)


def test_a_version_has_it_only_if_it_is_right(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    project.with_settings(promote={"onnx": True})
    model = project.train()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    checkpoint.save(project.paths.target, model, checkpoint.read_metadata(project.paths.target))
    project.evaluate()
    with pytest.raises(UserError, match="off by up to nan"):
        versions.register(project.settings, project.paths)
    (run,) = project.runs()
    assert mlflow.MlflowClient().search_registered_models() == []
    assert mlflow.search_logged_models([run.info.experiment_id], output_format="list") == []

    version = project.register()
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/{version}", dst_path=str(tmp_path / "version")))
    assert "data/model/target.onnx" in json.loads((folder / "manifest.json").read_text())["sha256"]
    recorded = load_file(folder / "data/model/recorded_examples.safetensors")
    session = onnxruntime.InferenceSession(folder / "data/model/target.onnx")
    (logits,) = session.run(None, {"images": data.to_float(recorded["images"]).numpy()})
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5)
