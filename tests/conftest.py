"""What several test files share: small settings, and one finished run of the whole chain."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.config import settings as settings_file
from tasks.config.settings import Settings

# Threads that wait for one another on busy cores spin: one is faster there. Set before PyTorch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"  # real images, where present


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The values of a complete parameter file that trains in seconds."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["prepare"].update(train_per_class=12, test_per_class=4)
    values["pretrain"].update(architecture={"name": "resnet18", "width": 4, "strides": [1, 2, 2, 2]}, epochs=1)
    values["train"].update(epochs=1, steps=2, batch_size=32)
    values["evaluate"].update(steps=2, autoattack_images=0, check_images=20)
    values["promote"].update(min_clean_accuracy=0.0, min_robust_accuracy=0.0)
    values["validate"].update(min_images_per_class=1)
    return values


@pytest.fixture
def tiny_settings(tiny_values: dict[str, Any]) -> Callable[..., Settings]:
    """`tiny_settings(train={"epochs": 2}, seed=3)`: the tiny settings with these values instead."""

    def make(**changes: Any) -> Settings:
        values = copy.deepcopy(tiny_values)
        for section, change in changes.items():
            if isinstance(change, dict):
                values[section].update(change)
            else:
                values[section] = change
        return settings_file.parse(values)

    return make


def copy_project(folder: Path) -> None:
    """Everything that the chain needs, as a fresh checkout would hold it."""
    for name in ("d2r_core", "tasks", "flows", "presets", ".dvc"):
        ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "reports/champion").mkdir(parents=True)
    shutil.copy(ROOT / "reports/champion/.gitkeep", folder / "reports/champion")
    shutil.copytree(ROOT / "data/raw", folder / "data/raw", ignore=shutil.ignore_patterns("*.dvc"))
