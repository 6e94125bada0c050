"""A password in the address of MLflow is in no output of `d2r`, in no table of Prefect, in no process's arguments."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import registry_project
import scratch_project as scratch
import yaml
from basic_auth import PASSWORD, USER, authenticating_proxy
from mlflow_server import Server, free_port
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from flows import promotion, retrain
from tasks import prefect_tasks
from tasks.config.settings import Settings
from tasks.tracking.errors import UnavailableError

pytestmark = pytest.mark.slow


def set_uri(project: Path, uri: str) -> None:
    """Write the address of MLflow into params.yaml."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["tracking"]["uri"] = uri
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def away() -> str:
    """The address of a server that does not run."""
    return f"http://{USER}:{PASSWORD}@127.0.0.1:{free_port()}"


def d2r(*arguments: str, cwd: Path, **variables: str) -> str:
    """The output of `d2r` on both streams."""
    environment = scratch.environment() | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} | variables
    process = subprocess.run(scratch.d2r(*arguments), cwd=cwd, env=environment, capture_output=True, text=True)
    return process.stdout + process.stderr


@pytest.mark.parametrize("origin", ["params.yaml", "environment"])
def test_status_with_a_server_that_is_away(finished_project: Path, origin: str) -> None:
    uri = away()
    if origin == "params.yaml":
        set_uri(finished_project, uri)
    variables = {"MLFLOW_TRACKING_URI": uri} if origin == "environment" else {}

    output = d2r("status", cwd=finished_project, **variables)

    assert f"MLflow at http://127.0.0.1:{uri.rpartition(':')[2]} does not answer" in output
    assert PASSWORD not in output


def test_status_names_a_database_without_its_password(finished_project: Path) -> None:
    database = f"sqlite:///mlflow.db?password={PASSWORD}"  # not yet created, so not opened

    output = d2r("status", cwd=finished_project, MLFLOW_TRACKING_URI=database)

    assert "MLflow      sqlite:///mlflow.db" in output
    assert PASSWORD not in output


def test_processes_of_a_stage_do_not_have_it_as_an_argument(finished_project: Path) -> None:
    (finished_project / "behaviour").write_text("second sleep")
    environment = scratch.environment() | {"MLFLOW_TRACKING_URI": away()}
    running = subprocess.Popen(scratch.d2r("stage", "second"), cwd=finished_project, env=environment)
    try:
        stages = scratch.pids(finished_project)
        arguments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    finally:
        running.send_signal(signal.SIGINT)
        running.wait()
    assert stages
    assert not [command for command in arguments if PASSWORD.encode() in command]


@pytest.fixture
def project(
    prefect_server: None,
    finished_project: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    tiny_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder: an evaluated project, in which no retry waits."""
    evaluated = registry_project.make_project(finished_project, tmp_path_factory, tiny_settings, monkeypatch)
    evaluated.train()
    evaluated.evaluate()
    (finished_project / "params.yaml").write_text(
        yaml.safe_dump(
            tiny_values
            | {"promote": tiny_values["promote"] | {"model_name": registry_project.NAME}}
            | {"tracking": {"uri": "sqlite:///mlflow.db", "experiment": "tests"}}
        )
    )
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # set by the connection, and undone after
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(promotion, "register", prefect_tasks.register.with_options(retry_delay_seconds=0))
    return finished_project


def tables_with_password(last_event: str) -> set[str]:
    """The tables of Prefect that hold the password, once the event of that kind is recorded."""
    path = PREFECT_API_DATABASE_CONNECTION_URL.value().partition(":///")[2]
    with closing(sqlite3.connect(path)) as connection:
        deadline = time.monotonic() + 60
        while not connection.execute("SELECT 1 FROM events WHERE event = ?", [last_event]).fetchone():
            assert time.monotonic() < deadline, f"Prefect has not recorded {last_event}"
            time.sleep(0.5)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables > {"artifact", "artifact_collection", "events", "log"}
        rows = {table: connection.execute(f'SELECT * FROM "{table}"').fetchall() for table in tables}
    assert rows["log"]
    return {table for table in tables if PASSWORD in repr(rows[table])}


def test_prefect_records_a_failure_without_it(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    set_uri(project, away())

    with pytest.raises(UnavailableError, match="does not answer") as error:
        retrain.retrain()

    assert PASSWORD not in str(error.value)
    assert PASSWORD not in "".join(capfd.readouterr())
    assert tables_with_password("prefect.flow-run.Failed") == set()


def test_prefect_and_mlflow_record_a_run_without_it(
    project: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path_factory.mktemp("store")
    server = Server(store)
    try:
        with authenticating_proxy(server.port) as port:
            set_uri(project, f"http://{USER}:{PASSWORD}@127.0.0.1:{port}")

            result = retrain.retrain()
    finally:
        server.kill()

    assert isinstance(result, promotion.PromotionResult)
    assert result.version == 1
    assert PASSWORD not in "".join(capfd.readouterr())
    assert tables_with_password("prefect.flow-run.Completed") == set()
    files = [path for folder in (store, project / "reports") for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files].count("params.yaml") == 2  # of the evaluation, and of the version
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
