"""A version's files are compared with those registered: when a client loads it, by register, gate and promote."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from registry_project import NAME, Project, logged_model_folder, make_project
from safetensors.torch import load_file, save_file

from d2r_core.errors import UserError
from d2r_core.files import sha256
from tasks.config.settings import Settings
from tasks.registry import integrity, versions

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def zero_weights(folder: Path) -> None:
    path = folder / "data/model/target.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)


def zero_weights_with_their_hash(folder: Path) -> None:
    zero_weights(folder)
    path = folder / "data/model/target.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "weights_sha256": sha256(path.with_suffix(".safetensors"))}))


def change_json(folder: Path) -> None:
    path = folder / "data/model/target.json"
    path.write_text(path.read_text().replace("digit 3", "digit 8"))


def forge_robustness(folder: Path) -> None:
    path = folder / "data/model/robustness.json"
    path.write_text(path.read_text().replace("0.6", "0.9"))


def add_file(folder: Path) -> None:
    (folder / "data/model/more.json").write_text("{}")


def remove_file(folder: Path) -> None:
    (folder / "data/model/examples.parquet").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def forge_all_with_the_manifest(folder: Path) -> None:
    zero_weights_with_their_hash(folder)
    forge_robustness(folder)
    integrity.write_manifest(folder)


TAMPERING = [
    (zero_weights, r"not as registered: data/model/target\.safetensors"),
    (zero_weights_with_their_hash, r"not as registered: data/model/target\.json, data/model/target\.safetensors"),
    (change_json, r"not as registered: data/model/target\.json"),
    (forge_robustness, r"not as registered: data/model/robustness\.json"),
    (add_file, r"not as registered: data/model/more\.json"),
    (remove_file, r"not as registered: data/model/examples\.parquet"),
    (remove_manifest, r"manifest\.json is missing or damaged"),
    (forge_all_with_the_manifest, r"manifest\.json is not the one that was registered"),
]


@pytest.mark.parametrize(("tamper", "message"), TAMPERING)
def test_tampered_version_is_neither_loaded_nor_moved(
    project: Project, tamper: Callable[[Path], None], message: str
) -> None:
    version = project.register()
    tamper(logged_model_folder(project.version(version)))
    message = f"digits version {version}: its files were changed after the registration .{message}"
    with pytest.raises(UserError, match=message):
        mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")
    with pytest.raises(UserError, match=message):
        versions.register(project.settings, project.paths)
    with pytest.raises(UserError, match=message):
        project.judge(version)
    with pytest.raises(UserError, match=message):
        project.promote(version)
    assert project.champion() is None
    assert "gate" not in project.version(version).tags


def test_tampered_version_is_not_downloaded(project: Project, tmp_path: Path) -> None:
    version = project.register()
    change_json(logged_model_folder(project.version(version)))
    with pytest.raises(UserError, match=r"not as registered: data/model/target\.json"):
        versions.download(project.settings, project.paths, f"models:/{NAME}@challenger", tmp_path)
    assert not (tmp_path / "target.safetensors").exists()


def test_deleted_version_is_registered_anew(project: Project) -> None:
    """What the message of a tampered version says."""
    version = project.register()
    zero_weights(logged_model_folder(project.version(version)))
    mlflow.MlflowClient().delete_model_version(NAME, str(version))
    anew = versions.register(project.settings, project.paths)
    integrity.verify(project.version(anew), None)


def test_version_without_manifest_is_registered_anew_and_not_promoted(project: Project) -> None:
    """As one that an older release registered."""
    version = project.register()
    mlflow.MlflowClient().delete_model_version_tag(NAME, str(version), "manifest_sha256")
    with pytest.raises(UserError, match=f"digits version {version} has no manifest of its files"):
        project.promote(version)
    anew = versions.register(project.settings, project.paths)
    assert project.versions() == [version, anew]
    project.promote(anew)


def test_version_carries_its_own_figures(project: Project, tmp_path: Path) -> None:
    """Another evaluation of the same weights, which goes to the same run, does not change them."""
    first = project.register(worst=0.6)
    project.with_settings(evaluate={"eps": 0.2})
    project.evaluate(worst=0.1)
    second = versions.register(project.settings, project.paths)
    for version, figure in ((first, 0.6), (second, 0.1)):
        content = integrity.fetch(project.version(version), tmp_path / f"version{version}", None)
        robustness = json.loads((content / "robustness.json").read_text())
        assert robustness["models"]["target"]["attacks"]["worst"]["accuracy"] == figure


def test_model_without_a_registry_is_compared_with_its_manifest(project: Project, tmp_path: Path) -> None:
    """As one that was copied to another machine."""
    version, download = project.register(), tmp_path / "download"
    integrity.fetch(project.version(version), download, None)
    (download / "registered_model_meta").unlink()
    mlflow.pyfunc.load_model(str(download))
    zero_weights(download)
    with pytest.raises(UserError, match=r"not as registered: data/model/target\.safetensors"):
        mlflow.pyfunc.load_model(str(download))
