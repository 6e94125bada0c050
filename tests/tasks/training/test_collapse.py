"""A training that stays at chance says so once and is marked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from registry_project import CLASSES, copy_store

from d2r_core import checkpoint, data
from d2r_core.data import Split
from tasks import pretrain
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.training.collapse import is_collapsed

pytestmark = pytest.mark.slow


@pytest.fixture
def paths(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Paths:
    copy_store(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    return Paths(tmp_path)


def prepare(paths: Paths, *, learnable: bool) -> None:
    """Ten patterns as images of ten classes, or the same images with labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=generator)
    splits = {}
    for name in ("train", "validation"):
        labels = torch.arange(10).repeat(20)
        splits[name] = Split(
            patterns[labels], labels if learnable else labels[torch.randperm(200, generator=generator)]
        )
        data.save_split(paths.prepared / f"{name}.safetensors", splits[name])
    counts = {name: {"images": len(split), "per_class": [20] * 10} for name, split in splits.items()}
    manifest = {"source": "digits", "path": None, "classes": CLASSES, "image_size": 8, "splits": counts}
    manifest["hash"] = data.content_hash(splits)
    paths.manifest.write_text(json.dumps(manifest))


@pytest.mark.parametrize("learnable", [False, True])
def test_a_training_at_chance_says_so_once(
    paths: Paths, tiny_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str], learnable: bool
) -> None:
    prepare(paths, learnable=learnable)
    pretrain.run(
        tiny_settings(
            tracking={"uri": "sqlite:///mlflow.db", "experiment": "tests"},
            pretrain={"epochs": 5, "batch_size": 32, "crop_padding": 0},
        ),
        paths,
    )
    output = capsys.readouterr().out
    assert (
        output.count("warning: pretrain: accuracy has been at chance (1 in 10) for the last 3 epochs") == 1 - learnable
    )
    assert checkpoint.read_metadata(paths.guidance)["collapsed"] is not learnable


def test_what_counts_as_collapsed() -> None:
    figures = {"images": 200, "classes": 10}
    assert is_collapsed([0.5, 0.1, 0.12, 0.09], **figures)
    assert not is_collapsed([0.1, 0.1], **figures), "two epochs are no proof"
    assert not is_collapsed([0.1, 0.1, 0.1, 0.3], **figures), "it has recovered"
