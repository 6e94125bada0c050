"""Where MLflow is, how its database comes into being, and what one that cannot be used is reported as."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from tracked_project import ROOT, settings_for, tracked_project

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.tracking import connection, errors


@pytest.fixture
def paths(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    with tracked_project(tmp_path, tmp_path_factory) as paths:
        yield paths


def test_relative_database_lies_in_the_project(paths: Paths) -> None:
    another = Paths(paths.root / "another")
    connection.configure(settings_for(), another)
    assert (another.root / "mlflow.db").stat().st_size > 0
    assert "MLFLOW_TRACKING_URI" not in os.environ
    experiment = mlflow.MlflowClient().get_experiment_by_name("tests")
    assert experiment is not None
    assert experiment.artifact_location == (another.root / "mlruns").as_uri()


@pytest.mark.slow
def test_several_processes_initialise_one_database(paths: Paths) -> None:
    program = (
        "from pathlib import Path\n"
        "from tasks.config import settings\n"
        "from tasks.config.paths import Paths\n"
        "from tasks.tracking import connection\n"
        f"connection.configure(settings.load(Path({str(ROOT / 'params.yaml')!r})), Paths())\n"
        "import mlflow\n"
        "mlflow.MlflowClient().search_registered_models()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///store/mlflow.db"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=paths.root, env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    stderrs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, stderrs
    connection.configure(settings_for("sqlite:///store/mlflow.db"), paths)
    assert len(mlflow.MlflowClient().search_experiments()) == 3  # MLflow's default, params.yaml's and this test's


def test_variable_wins_over_settings(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{paths.root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    connection.configure(settings_for("sqlite:///never.db"), paths)
    assert mlflow.get_tracking_uri() == uri
    assert os.environ["MLFLOW_TRACKING_URI"] == uri
    assert not (paths.root / "never.db").exists()


def test_second_project_does_not_inherit_the_first_ones_database(paths: Paths) -> None:
    shutil.copy(paths.root / "mlflow.db", paths.root / "other.db")
    connection.configure(settings_for("sqlite:///mlflow.db"), paths)
    connection.configure(settings_for("sqlite:///other.db"), paths)
    assert mlflow.get_tracking_uri() == f"sqlite:///{paths.root / 'other.db'}"


def test_server_that_accepts_and_never_answers(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(errors.UnavailableError, match="does not answer"):
            connection.configure(settings_for(uri), paths)


def test_file_that_is_no_database(paths: Paths) -> None:
    (paths.root / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(UserError, match=r"mlflow\.db: cannot be used as MLflow's database .* Move it away"):
        connection.configure(settings_for("sqlite:///mlflow.db"), paths)


def test_folder_that_cannot_be_made(paths: Paths) -> None:
    (paths.root / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used as MLflow's database"):
        connection.configure(settings_for("sqlite:///file/mlflow.db"), paths)


def test_address_of_an_unknown_kind(paths: Paths) -> None:
    with pytest.raises(UserError, match="MLflow at nonsense://here refuses"):
        connection.configure(settings_for("nonsense://here"), paths)


def test_deleted_experiment_says_how_to_restore_it(paths: Paths) -> None:
    settings = settings_for(experiment="deleted")
    connection.configure(settings, paths)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("deleted")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match=r"'deleted' is deleted.*mlflow experiments restore"):
        connection.configure(settings, paths)
