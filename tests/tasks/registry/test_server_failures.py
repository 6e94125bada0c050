"""The registry on a real server that is away, dies in the middle, or lets a user do less."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow_server import Server, free_port
from registry_project import NAME, Project, make_project
from typer.testing import CliRunner

from d2r_core.errors import UserError
from flows.cli import app
from tasks.config.settings import Settings
from tasks.registry import lock
from tasks.tracking.errors import UnavailableError

pytestmark = pytest.mark.slow

ADMIN, PASSWORD = "operator", "planted-hunter2-long"
COMMANDS = (
    ("promote", "1", "--reason", "r"),
    ("promote", "1", "--to", "other", "--reason", "r"),
    ("rollback", "--reason", "r"),
    ("release", "1"),
    ("models",),
    ("history",),
    ("compare", "1", "2"),
    ("lineage", "1"),
    ("approve", "1", "--reason", "r"),
    ("gc",),
    ("reproduce", "1"),
    ("predict", "images"),
)


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


@contextmanager
def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    try:
        yield
    finally:
        server.kill()


def test_every_command_says_that_the_server_is_away(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{ADMIN}:{PASSWORD}@{address}")
    monkeypatch.setattr("tasks.config.settings.load", lambda path: project.settings)
    (project.paths.root / "images").mkdir()
    for command in COMMANDS:
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, UnavailableError), (command, result.output, result.exception)
        message = str(result.exception)
        assert f"MLflow at http://{address} does not answer" in message
        assert PASSWORD not in message + result.output


@pytest.mark.parametrize("files", [1, 5, 10])
def test_a_registration_whose_server_is_killed_is_finished_by_the_next(
    project: Project, tmp_path_factory: pytest.TempPathFactory, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many files had arrived. Nothing is registered, and what was uploaded is not there twice."""
    monkeypatch.setattr(lock, "LEASE", 1.0)  # the lock of the dead attempt
    server = Server(tmp_path_factory.mktemp("server"))
    with use(server, monkeypatch):
        project.train()
        project.evaluate()
        stored = server.folder / "artifacts"

        def kill() -> None:
            while sum(path.is_file() for path in stored.rglob("*")) < files:
                time.sleep(0.001)
            server.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(UnavailableError, match="does not answer"):
            project.register_present()
        killer.join()
        server.start()
        assert project.versions() == []
        assert project.register_present() == 1
        assert project.versions() == [1]
        assert project.challenger() == 1
        assert project.judge(1).passed
        assert len(project.runs()) == 1
        assert project.register_present() == 1


def test_a_user_without_permission_moves_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On MLflow's own basic authentication, of which each request takes half a second to hash a password."""
    for seed in (0, 1):
        project.register(seed)
    project.promote(1)
    # A database that had no users: nobody owns what is in it.
    config = tmp_path / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        f"admin_username = {ADMIN}\nadmin_password = {PASSWORD}\n",
        encoding="utf-8",
    )
    server = Server(
        tmp_path,
        "--app-name",
        "basic-auth",
        MLFLOW_AUTH_CONFIG_PATH=str(config),
        MLFLOW_FLASK_SERVER_SECRET_KEY="of the test",
    )
    with use(server, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        reader = {"username": "reader", "password": "another-long-password"}
        address = f"http://127.0.0.1:{server.port}"
        created = httpx.post(f"{address}/api/2.0/mlflow/users/create", json=reader, auth=(ADMIN, PASSWORD))
        assert created.is_success, created.text

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", reader["username"])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", reader["password"])
        assert project.champion() == 1
        with pytest.raises(UserError, match=f"(?i)MLflow at {address} refuses: .*permission"):
            project.promote(2)
        assert project.champion() == 1
        assert project.history() == [(None, 1)]

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-long-password")
        with pytest.raises(UserError, match=f"MLflow at {address} refuses") as refusal:
            project.champion()
        assert "wrong-long-password" not in str(refusal.value)

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert project.promote(2)
        assert [model.name for model in mlflow.MlflowClient().search_registered_models()] == [NAME]  # no lock is left
