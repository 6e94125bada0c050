"""A version is copied to another registered model or server and becomes champion there."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow_server import Server
from registry_project import Project, files_of, images, logged_model_folder, make_project
from typer.testing import CliRunner

from d2r_core.errors import UserError
from flows.cli import app
from tasks.config.settings import Settings
from tasks.registry import history, integrity, moves, transfer

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def promote(project: Project, version: int, name: str, server: str | None = None, force: bool = False) -> int:
    return transfer.promote(
        project.settings,
        project.paths,
        version,
        name=name,
        server=server,
        who="tester@host",
        reason="It served a week in staging.",
        force=force,
    )


def register_passed(project: Project, seed: int = 0) -> int:
    version = project.register(seed)
    assert project.judge(version).passed
    return version


def check_copy(original: ModelVersion, name: str, version: int, uri: str) -> None:
    """The copy, at `uri`, has all of the original and answers alike."""
    expected = mlflow.pyfunc.load_model(f"models:/{original.name}/{original.version}").predict(images(3))
    evaluation = files_of(str(original.run_id))
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    copy = client.get_model_version(name, str(version))
    origin = json.loads(copy.tags["copied_from"])
    assert (origin["model"], origin["version"]) == (original.name, int(original.version))
    assert {**copy.tags, "copied_from": None} == {**original.tags, "copied_from": None}
    integrity.verify(copy, None)
    answers = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(images(3))
    assert np.array_equal(np.stack(answers["probabilities"]), np.stack(expected["probabilities"]))
    assert files_of(str(copy.run_id)) == evaluation
    (entry,) = history.entries(client, name)
    assert (entry.move.to_version, entry.move.who, entry.outcome) == (version, "tester@host", "completed")


def test_to_another_name_on_the_same_server(project: Project) -> None:
    version = register_passed(project)
    original = project.version(version)
    copy = promote(project, version, "production")
    check_copy(original, "production", copy, mlflow.get_tracking_uri())
    assert promote(project, version, "production") == copy, "once more changes nothing"
    assert len(MlflowClient().search_model_versions("name = 'production'")) == 1
    assert project.champion() is None
    params = project.settings.model_dump(mode="json", by_alias=True)  # JSON is YAML
    project.paths.params.write_text(json.dumps(params), encoding="utf-8")
    result = CliRunner().invoke(app, ["promote", "1", "--to", "staging", "--reason", "to be watched"])
    assert result.output == "digits version 1 is @champion of staging as version 1.\n"


@pytest.mark.parametrize("kind", ["database", "server"])
def test_to_another_server(project: Project, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    version = register_passed(project)
    original, uri = project.version(version), mlflow.get_tracking_uri()
    if kind == "server":
        other = f"http://127.0.0.1:{request.getfixturevalue('server').port}"
    else:
        other = f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"
        (tmp_path / "other").mkdir()
        shutil.copy(tmp_path / "mlflow.db", tmp_path / "other/mlflow.db")
    target = "production"
    copy = promote(project, version, target, other)
    mlflow.set_tracking_uri(uri)
    check_copy(original, target, copy, other)
    assert promote(project, version, target, other) == copy
    mlflow.set_tracking_uri(other)
    assert len(MlflowClient().search_model_versions(f"name = '{target}'")) == 1
    history_of_loss = MlflowClient().get_metric_history(
        str(MlflowClient().get_model_version(target, "1").run_id), "loss"
    )
    assert [(point.step, point.value) for point in history_of_loss] == [(1, 2.5), (2, 1.5)]


def test_what_may_not_be_promoted_is_not_copied(project: Project) -> None:
    version = project.register()
    with pytest.raises(moves.RefusedError, match="has not been judged by the gate"):
        promote(project, version, "production")
    assert promote(project, version, "production", force=True) == 1
    project.register(1, worst=0.9)
    second = 2
    assert project.judge(second).passed
    path = logged_model_folder(project.version(second)) / "data/model/target.json"
    path.write_text(path.read_text().replace("digit 3", "digit 8"))
    with pytest.raises(UserError, match="digits version 2: its files were changed"):
        promote(project, second, "production", force=True)
    assert len(MlflowClient().search_model_versions("name = 'production'")) == 1


def test_a_copy_that_was_interrupted_is_finished_by_the_next(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register_passed(project)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "other/mlflow.db")
    other = f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "finalize_logged_model", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(project, version, "production", other)
    mlflow.set_tracking_uri(other)
    assert MlflowClient().search_model_versions("name = 'production'") == []
    assert promote(project, version, "production", other) == 1
    mlflow.set_tracking_uri(other)
    copies = [
        run
        for run in mlflow.search_runs(experiment_names=["tests"], output_format="list")
        if "copied_from" in run.data.tags
    ]
    assert [run.info.status for run in copies] == ["FINISHED"]
