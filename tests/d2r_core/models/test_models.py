"""The architectures agree with the published ones: names, shapes, logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_weights import fill, images
from safetensors.torch import save_file

from d2r_core import models
from d2r_core.errors import UserError

REFERENCE = Path(__file__).parents[2] / "reference"
KEYS = json.loads((REFERENCE / "architecture_keys.json").read_text())
SIZES = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny_imagenet": (200, 64)}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "wide_resnet_34_10": {"name": "wide_resnet", "depth": 34, "widen_factor": 10},
    "wide_resnet_10_1": {"name": "wide_resnet", "depth": 10, "widen_factor": 1},
    "preact_resnet18": {"name": "preact_resnet18"},
    "resnet18_guidance": {"name": "resnet18"},
}


def build(case: str) -> torch.nn.Module:
    architecture, dataset = case.split("/")
    classes, size = SIZES[dataset]
    return models.build(num_classes=classes, image_size=size, **ARCHITECTURES[architecture])


@pytest.mark.parametrize("case", KEYS)
def test_names_shapes_and_logits_are_the_published_ones(case: str) -> None:
    with torch.device("cpu"):
        model = build(case).double().eval()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == KEYS[case]
    fill(model)
    with torch.no_grad():
        logits = model(images(SIZES[case.split("/")[1]][1])).numpy()
    expected = np.load(REFERENCE / "architecture_logits.npz")[case]
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_wrappings_are_opened(tmp_path: Path, suffix: str) -> None:
    source, model = build("wide_resnet_10_1/cifar10"), build("wide_resnet_10_1/cifar10")
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    state["module.sub_block1.layer.0.bn1.weight"] = torch.ones(3)
    path = tmp_path / f"published{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    models.load_weights(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(build("wide_resnet_10_1/cifar10").state_dict(), tmp_path / "other.pt")
    model = build("preact_resnet18/cifar10")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"other\.pt: does not fit PreActResNet18: it lacks layer1\.0"):
        models.load_weights(model, tmp_path / "other.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pickle_with_code_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": print}, tmp_path / "code.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    for name in ("code.pt", "torn.safetensors", "absent.pt"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
            models.load_weights(build("wide_resnet_10_1/cifar10"), tmp_path / name)


def test_any_size_is_pooled_globally() -> None:
    for name in ("wide_resnet_10_1", "preact_resnet18", "resnet18_guidance"):
        model = models.build(num_classes=7, image_size=16, **ARCHITECTURES[name])
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="wide_resnet, preact_resnet18, resnet18"):
        models.build("vgg", num_classes=10)
