"""Versions are registered and downloaded, in a real sqlite store with real small models."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from registry_project import NAME, Project, files_of, logged_model_folder, make_project

from d2r_core import checkpoint
from d2r_core.errors import UserError
from d2r_core.files import sha256
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import model_logging, servable, versions
from tasks.registry.status import identity_of

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def test_version_holds_where_the_model_comes_from(project: Project) -> None:
    project.train()
    project.evaluate(clean=0.95, worst=0.6)
    metadata = checkpoint.read_metadata(project.paths.target)
    # As if MLflow had been away when the training ended.
    mlflow.MlflowClient().update_run(metadata["mlflow_run_id"], status="RUNNING")
    version = versions.register(project.settings, project.paths)
    registered = project.version(version)
    assert registered.tags == {
        "git_commit": metadata["git_commit"],
        "git_dirty": str(metadata["git_dirty"]).lower(),
        "data_hash": read_manifest(project.paths)["hash"],
        "settings_hash": metadata["settings_hash"],
        "collapsed": "false",
        "weights_sha256": metadata["weights_sha256"],
        "evaluation_hash": project.settings.hash("seed", "evaluate"),
        "clean_accuracy": "0.95",
        "robust_accuracy": "0.6",
        "eps": "0.1",
        "checks": "passed",
        "manifest_sha256": sha256(logged_model_folder(registered) / "manifest.json"),
    }
    assert project.challenger() == version
    assert project.champion() is None

    (run,) = project.runs()
    assert registered.run_id == run.info.run_id == metadata["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/target/worst"] == 0.6
    assert run.data.metrics["test/guidance/clean"] == 0.98
    assert files_of(run.info.run_id) == {"evaluations", "pretrain_history.csv", "train_history.csv"}
    evaluation = str(model_logging.evaluation_folder(RobustnessReport.read(project.paths.robustness).identity))
    files = ("report.html", "model_card.md", "data.html", "robustness.json", "examples.parquet", "comparison.json")
    assert files_of(run.info.run_id, evaluation) == {
        f"{evaluation}/{name}" for name in (*files, "validation", "params.yaml", "dvc.lock", "bom.json")
    }
    logged = mlflow.get_logged_model(str(registered.source).removeprefix("models:/"))
    assert (logged.source_run_id, logged.experiment_id) == (run.info.run_id, run.info.experiment_id)
    assert logged.params == run.data.params
    assert not list(project.paths.root.glob("mlruns/*"))  # where the default experiment would be
    validation = f"{evaluation}/validation"
    assert files_of(run.info.run_id, validation) == {f"{validation}/index.html", f"{validation}/accepted.json"}
    # The run missed the second epoch; the first one is not there twice.
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 1.5)]


def test_same_model_is_registered_once(project: Project) -> None:
    first = project.register()
    second = project.register(seed=1)
    assert (first, second) == (1, 2)
    assert project.challenger() == second
    project.evaluate()
    assert versions.register(project.settings, project.paths) == second
    # Another evaluation of the same weights is another version, of the same run.
    project.with_settings(evaluate={"eps": 0.2})
    project.evaluate(worst=0.1)
    third = versions.register(project.settings, project.paths)
    assert project.versions() == [1, 2, 3]
    assert project.version(third).run_id == project.version(second).run_id
    assert project.version(third).tags["robust_accuracy"] == "0.1"
    # And leaves the files of the earlier evaluation as they were.
    for version, worst in ((second, 0.6), (third, 0.1)):
        registered = project.version(version)
        folder = model_logging.evaluation_folder(identity_of(registered))
        path = mlflow.MlflowClient().download_artifacts(str(registered.run_id), f"{folder}/robustness.json")
        assert RobustnessReport.read(Path(path)).target.attacks["worst"].accuracy == worst


def test_nothing_is_registered_when_logging_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.train()
    project.evaluate()

    def fail(*arguments: object) -> str:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(servable, "log_model", fail)
        with pytest.raises(OSError, match="no space left"):
            versions.register(project.settings, project.paths)
    assert mlflow.MlflowClient().search_registered_models() == []
    (run,) = project.runs()
    assert run.info.status == "FINISHED"
    assert versions.register(project.settings, project.paths) == 1


def test_version_without_its_alias_is_not_registered_twice(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.train()
    project.evaluate()

    def fail(*arguments: object) -> None:
        raise mlflow.MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(UserError, match="refuses: gone"):
            versions.register(project.settings, project.paths)
    assert versions.register(project.settings, project.paths) == project.challenger() == 1


def damage_report(project: Project) -> None:
    project.paths.report.unlink()


def damage_weights(project: Project) -> None:
    project.paths.target.write_bytes(b"half")


def exchange_weights(project: Project) -> None:
    project.train(seed=1)


def exchange_data(project: Project) -> None:
    project.prepare(seed=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_report, r"report\.html is missing\. `d2r run` makes it\."),
        (damage_weights, r"target\.safetensors: cannot be read as weights"),
        (exchange_weights, r"robustness\.json: was measured on other weights than .*target\.safetensors"),
        (exchange_data, r"are of different data"),
    ],
)
def test_artifacts_that_do_not_belong_together(
    project: Project, damage: Callable[[Project], None], message: str
) -> None:
    project.train()
    project.evaluate()
    damage(project)
    with pytest.raises(UserError, match=message):
        versions.register(project.settings, project.paths)
    assert mlflow.MlflowClient().search_registered_models() == []
    assert all(files_of(run.info.run_id) == set() for run in project.runs())


def test_a_registered_checkpoint_can_be_had_by_its_reference(project: Project, tmp_path: Path) -> None:
    version = project.register()
    project.promote(version)
    weights = project.paths.target.read_bytes()
    for number, reference in enumerate((f"models:/{NAME}@champion", f"models:/{NAME}/{version}")):
        path = versions.download(project.settings, project.paths, reference, tmp_path / f"download{number}")
        assert path.read_bytes() == weights
        assert checkpoint.load(path, torch.device("cpu"))
    for reference, message in (
        (f"models:/{NAME}@winner", "there is no such version in MLflow"),
        (f"models:/{NAME}/7", "there is no such version in MLflow"),
        ("models:/other@champion", "there is no such version in MLflow"),
        (f"models:/{NAME}", "write models:/NAME@champion, models:/NAME@challenger or models:/NAME/VERSION"),
    ):
        with pytest.raises(UserError, match=message):
            versions.download(project.settings, project.paths, reference, tmp_path / "none")
