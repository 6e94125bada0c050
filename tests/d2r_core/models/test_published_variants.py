"""Published networks whose weights have the same names and shapes, and which compute something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_weights import fill, images

from d2r_core import models
from d2r_core.models.normalization import NORMALIZATIONS, Normalized

# Recorded from the classes of RobustBench (commit 78fcc9e) in float64, under the rule of reference_weights
LOGITS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "reference/robustbench_logits.json").read_text())
CIFAR10, CIFAR100 = NORMALIZATIONS["cifar10"], NORMALIZATIONS["cifar100"]
CIFAR100_RICE = {
    "mean": (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    "std": (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
}
PREACT: dict[str, Any] = {"name": "preact_resnet18", "num_classes": 10}
WIDE: dict[str, Any] = {"name": "wide_resnet", "num_classes": 10, "depth": 10, "widen_factor": 1}
DM_WIDE: dict[str, Any] = {"name": "dm_wide_resnet", "num_classes": 10, "widen_factor": 1, "normalization": CIFAR10}
DM_PREACT: dict[str, Any] = {"name": "dm_preact_resnet18", "num_classes": 100, "normalization": CIFAR100}
BEHIND_CIFAR10: dict[str, Any] = {"normalization": CIFAR10}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Andriushchenko2020Understanding": {**PREACT, "shortcut_from": "input"},
    "Wong2020Fast": {**PREACT, "shortcut_from": "input", **BEHIND_CIFAR10},
    "Rice2020Overfitting_L2": {**PREACT, "shortcut_from": "activated", "final_norm": True, **BEHIND_CIFAR10},
    "Rice2020Overfitting_cifar100": {
        **PREACT,
        "num_classes": 100,
        "shortcut_from": "activated",
        "final_norm": True,
        "normalization": CIFAR100_RICE,
    },
    "Hendrycks2019Using_10_1": {**WIDE, "normalization": NORMALIZATIONS["symmetric"]},
    "Ding2020MMA_10_1": {**WIDE, "normalization": "per_image"},
    "DMWideResNet_10_1_silu": {**DM_WIDE, "depth": 10, "activation": "silu"},
    "DMWideResNet_16_1_relu": {**DM_WIDE, "depth": 16, "activation": "relu"},
    "DMPreActResNet18_silu": {**DM_PREACT, "activation": "silu"},
    "ResNet18": {"name": "resnet18", "num_classes": 10, "strides": (1, 2, 2, 2)},
}


def logits(**architecture: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the reference's images, under the reference's weights."""
    model = models.build(**architecture).double().eval()
    fill(model.network if isinstance(model, Normalized) else model)
    with torch.no_grad():
        return model(images(32)).numpy()


def deviation(result: np.ndarray[Any, Any], case: str) -> float:
    expected = np.array(LOGITS[case])
    return float(np.abs(result - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", LOGITS)
def test_a_variant_computes_what_the_published_class_computes(case: str) -> None:
    assert deviation(logits(**ARCHITECTURES[case]), case) < 1e-6


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("Andriushchenko2020Understanding", {"shortcut_from": "activated"}),
        ("Wong2020Fast", {"normalization": None}),
        ("Hendrycks2019Using_10_1", {"normalization": None}),
        ("Ding2020MMA_10_1", {"normalization": None}),
        ("DMWideResNet_10_1_silu", {"activation": "relu"}),
        ("ResNet18", {"strides": (1, 1, 2, 2)}),
    ],
)
def test_the_same_weights_in_another_variant_compute_something_else(case: str, other: dict[str, Any]) -> None:
    assert deviation(logits(**{**ARCHITECTURES[case], **other}), case) > 0.01


def test_a_uniform_image_is_normalised_by_its_mean_alone() -> None:
    model = Normalized(torch.nn.Identity(), "per_image")
    x = torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(model(grey), torch.zeros_like(grey))
    torch.testing.assert_close(model(x), (x - x.mean()) / x.std())
