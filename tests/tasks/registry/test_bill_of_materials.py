"""The bill of materials of a version: valid CycloneDX, of this version's files, and the same for the same inputs."""

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from project import ROOT
from registry_project import NAME, Project, logged_model_folder, make_project

from d2r_core import checkpoint
from d2r_core.errors import UserError
from d2r_core.files import sha256
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import model_logging, versions

pytestmark = pytest.mark.slow

COMMIT, MD5 = "1" * 40, "2" * 32


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """With requirements.lock, a guidance model, raw data in dvc.lock, and a commit."""
    project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    monkeypatch.setenv("D2R_GIT_COMMIT", COMMIT)
    deps = [{"path": "data/raw/signs", "md5": f"{MD5}.dir"}, {"path": "tasks/data", "md5": "0" * 32}]
    project.paths.dvc_lock.write_text(yaml.safe_dump({"stages": {"prepare": {"deps": deps}}}))
    guidance = project.train(seed=9)
    checkpoint.save(project.paths.guidance, guidance, checkpoint.read_metadata(project.paths.target))
    return project


def read_bill(project: Project, version: int) -> tuple[str, Path]:
    """The bill among the files of a version, and their folder."""
    folder = logged_model_folder(project.version(version)) / "data/model"
    return (folder / "bom.json").read_text(encoding="utf-8"), folder


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {each["name"].removeprefix("d2r:"): each["value"] for each in component["properties"]}


def test_version_carries_a_valid_bill(project: Project) -> None:
    text, folder = read_bill(project, project.register())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None

    bill: dict[str, Any] = json.loads(text)
    described = checkpoint.read_metadata(folder / "target.safetensors")
    model, components = bill["metadata"]["component"], {each["bom-ref"]: each for each in bill["components"]}
    assert (model["type"], model["name"]) == ("machine-learning-model", NAME)
    assert model["hashes"] == [{"alg": "SHA-256", "content": sha256(folder / "target.safetensors")}]
    assert components["guidance"]["hashes"] == [{"alg": "SHA-256", "content": sha256(project.paths.guidance)}]
    data, raw, code = components["data"], components["raw-data"], components["d2r"]
    assert data["hashes"] == [{"alg": "SHA-256", "content": described["data_hash"]}]
    assert data["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert properties(data) == {"source": "digits", "classes": "10", "images.train": "20", "images.test": "20"}
    assert (raw["name"], raw["hashes"]) == ("data/raw/signs", [{"alg": "MD5", "content": MD5}])
    assert code["pedigree"]["commits"] == [{"uid": COMMIT}]
    assert code["licenses"] == [{"license": {"id": "MIT"}}]
    assert properties(code)["lock_sha256"] == sha256(ROOT / "requirements.lock")
    depends_on = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert depends_on["model"] == ["d2r", "data", "guidance"]
    assert depends_on["guidance"] == ["d2r", "data"]
    assert depends_on["data"] == ["raw-data"]
    assert set(depends_on["d2r"]) == {ref for ref in components if ref.startswith("pkg:pypi/")}


def test_bill_has_the_packages_of_the_lock(project: Project) -> None:
    (project.paths.root / "requirements.lock").write_text(
        f"numpy=={metadata.version('numpy')} \\\n    --hash=sha256:x\n"
        "pydantic==0.1 \\\n    --hash=sha256:x\nnot-on-this-platform==1.0 \\\n    --hash=sha256:x\n"
    )
    text, _ = read_bill(project, project.register())
    packages = {each["name"]: each for each in json.loads(text)["components"] if each["type"] == "library"}
    assert set(packages) == {"numpy", "pydantic"}
    for name, package in packages.items():
        assert package["version"] == metadata.version(name)
        assert package["purl"] == f"pkg:pypi/{name}@{metadata.version(name)}"
        assert package["licenses"]
    assert "properties" not in packages["numpy"]
    assert properties(packages["pydantic"]) == {"locked": "0.1"}
    assert packages["pydantic"]["licenses"] == [{"license": {"id": "MIT"}}]


def test_bill_has_the_figures_and_whose_they_are(project: Project) -> None:
    text, folder = read_bill(project, project.register(clean=0.95, worst=0.6))
    card, robustness = (
        json.loads(text)["metadata"]["component"]["modelCard"],
        RobustnessReport.read(folder / "robustness.json"),
    )
    figures = {each["slice"].partition(":")[0]: each for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert set(figures) == set(robustness.target.attacks)
    assert (figures["clean"]["value"], figures["worst"]["value"]) == ("0.95", "0.6")
    assert "Linf eps 0.1, 20 images, seed 0" in figures["worst"]["slice"]
    low, high = robustness.target.attacks["worst"].interval
    assert figures["worst"]["confidenceInterval"] == {"lowerBound": str(low), "upperBound": str(high)}
    assert properties(card).items() >= robustness.identity.model_dump().items()
    assert card["modelParameters"]["modelArchitecture"] == "wide_resnet"
    assert card["modelParameters"]["datasets"] == [{"ref": "data"}, {"ref": "raw-data"}]


def test_bill_lies_beside_the_model_card_and_in_the_manifest(project: Project, tmp_path: Path) -> None:
    version = project.register()
    text, folder = read_bill(project, version)
    robustness, run_id = RobustnessReport.read(folder / "robustness.json"), str(project.version(version).run_id)
    evaluation = mlflow.MlflowClient().download_artifacts(
        run_id, str(model_logging.evaluation_folder(robustness.identity)), str(tmp_path)
    )
    assert (Path(evaluation) / "model_card.md").is_file()
    assert (Path(evaluation) / "bom.json").read_text(encoding="utf-8") == text
    (folder / "bom.json").write_text(text.replace(COMMIT, "3" * 40))
    with pytest.raises(UserError, match=r"not as registered: data/model/bom\.json"):
        project.promote(version)


def test_same_model_and_packages_give_the_same_bytes(project: Project) -> None:
    first = project.register()
    before, _ = read_bill(project, first)
    mlflow.MlflowClient().delete_model_version(NAME, str(first))
    again, _ = read_bill(project, versions.register(project.settings, project.paths))
    other, _ = read_bill(project, project.register(seed=1))
    assert again == before
    assert json.loads(other)["serialNumber"] != json.loads(before)["serialNumber"]
