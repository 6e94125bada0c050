"""Saved weights come back exactly; damaged files and wrong pairs are refused."""

from pathlib import Path

import pytest
import torch
from toy import CPU, network

from d2r_core import checkpoint
from d2r_core.errors import UserError


def test_a_checkpoint_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = network(0).eval()
    architecture = {"name": "wide_resnet", "depth": 10, "widen_factor": 1, "num_classes": 2, "image_size": 8}
    path = tmp_path / "target.safetensors"
    checkpoint.save(path, model, {"architecture": architecture})
    loaded, metadata = checkpoint.load(path, CPU)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    assert metadata["architecture"] == architecture
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["target.json", "target.safetensors"]

    checkpoint.save(tmp_path / "other.safetensors", network(1), {"architecture": architecture})
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"target\.safetensors: is not the file that target\.json describes"):
        checkpoint.load(path, CPU)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"target\.safetensors: cannot be read as weights"):
        checkpoint.load(path, CPU)
    (tmp_path / "target.json").unlink()
    with pytest.raises(UserError, match=r"target\.json: cannot be read"):
        checkpoint.load(path, CPU)
