"""The bill of materials of a version: valid CycloneDX, with the hashes of the version; the same inputs, the same bytes."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from registry_project import NAME, Project, make_project

from d2r_core import checkpoint
from d2r_core.files import sha256
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import bill_of_materials, model_logging, versions

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def files_of_version(project: Project, version: int, folder: Path) -> Path:
    registered = project.version(version)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/{registered.version}", dst_path=str(folder)))


def test_version_and_evaluation_carry_a_valid_bill(project: Project, tmp_path: Path) -> None:
    version = project.register(clean=0.95, worst=0.6)
    folder = files_of_version(project, version, tmp_path / "version") / "data/model"
    text = (folder / "bom.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None

    bill: dict[str, Any] = json.loads(text)
    model, described = bill["metadata"]["component"], checkpoint.read_metadata(folder / "target.safetensors")
    assert (model["type"], model["name"]) == ("machine-learning-model", NAME)
    assert model["hashes"] == [{"alg": "SHA-256", "content": sha256(folder / "target.safetensors")}]
    properties = {each["name"]: each["value"] for each in model["properties"]}
    assert (properties["d2r:accuracy.clean"], properties["d2r:accuracy.worst"]) == ("0.95", "0.6")
    components = {each["bom-ref"]: each for each in bill["components"]}
    assert components["data"]["type"] == "data"
    assert components["data"]["hashes"] == [{"alg": "SHA-256", "content": described["data_hash"]}]
    assert components["d2r"]["pedigree"]["commits"] == [{"uid": described["git_commit"]}]
    for name in ("torch", "mlflow", "safetensors"):
        purls = [each for each in components if each.startswith(f"pkg:pypi/{name}@")]
        assert [components[purl]["version"] for purl in purls] == [metadata.version(name)]
    assert not any(purl.startswith("pkg:pypi/pytest@") for purl in components)
    depends_on = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert depends_on["model"] == ["d2r", "data"]
    assert set(depends_on["d2r"]) == set(components) - {"d2r", "data"}

    run_id, robustness = str(project.version(version).run_id), RobustnessReport.read(folder / "robustness.json")
    path = f"{model_logging.evaluation_folder(robustness.identity)}/bom.json"
    logged = mlflow.MlflowClient().download_artifacts(run_id, path, str(tmp_path))
    assert Path(logged).read_text(encoding="utf-8") == text


def test_same_inputs_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    first = project.register()
    client = mlflow.MlflowClient()
    client.delete_model_version(NAME, str(first))
    anew = versions.register(project.settings, project.paths)
    other = project.register(seed=1)
    bills = []
    for name, version in (("anew", anew), ("other", other)):
        folder = files_of_version(project, version, tmp_path / name)
        bills.append((folder / "data/model/bom.json").read_bytes())
    assert bills[0] != bills[1]
    described, robustness = (tmp_path / "anew/data/model" / name for name in ("target.safetensors", "robustness.json"))
    timestamp = json.loads(bills[0])["metadata"]["timestamp"]
    run = client.get_run(str(project.version(anew).run_id))
    trained = bill_of_materials.datetime.fromisoformat(timestamp)
    assert int(trained.timestamp() * 1000) == run.info.start_time
    rendered = [
        bill_of_materials.render(
            NAME, checkpoint.read_metadata(described), RobustnessReport.read(robustness), trained
        ).encode()
        for _ in range(2)
    ]
    assert rendered == [bills[0]] * 2
