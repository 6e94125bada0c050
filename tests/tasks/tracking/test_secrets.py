"""No credentials in what is printed, logged or stored."""

import os
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from basic_auth import PASSWORD, USER, authenticating_proxy
from mlflow_server import Server, free_port
from tracked_project import settings_for, tracked_project

from d2r_core.errors import UserError
from flows import summary
from tasks.config import settings as settings_file
from tasks.config.credentials import redact, without_credentials
from tasks.config.paths import Paths
from tasks.tracking import connection, errors, runs, uri

pytestmark = pytest.mark.slow


@pytest.fixture
def paths(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # set by the connection, and undone after
        monkeypatch.setenv(name, "")
    with tracked_project(tmp_path, tmp_path_factory) as paths:
        yield paths


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("http://user:PLANTED@host:5000/path", "http://host:5000/path"),
        ("https://PLANTED@host", "https://host"),
        ("http://user:a@PLANTED@host:5000", "http://host:5000"),
        ("http://user:a/PLANTED@host:5000", "http://host:5000"),
        ("http://user:a#PLANTED ?x@host:5000", "http://host:5000"),
        ("postgresql+psycopg2://user:PLANTED@host/db", "postgresql+psycopg2://host/db"),
        ("postgresql://host/db?user=me&password=PLANTED", "postgresql://host/db?user=me&password=***"),
        ("https://host/container?sig=PLANTED&v=1", "https://host/container?sig=***&v=1"),
        ("https://host/?access_token=PLANTED", "https://host/?access_token=***"),
    ],
)
def test_credentials_are_removed_from_a_uri(address: str, public: str) -> None:
    assert without_credentials(address) == public
    assert redact(f"({address}) refused", address) == f"({public}) refused"


@pytest.mark.parametrize(
    "address",
    ["sqlite:///mlflow.db", "sqlite:////srv/me@work/mlflow.db", "http://[::1]:5000/@x", "models:/digits@champion", "-"],
)
def test_a_uri_without_credentials_is_not_changed(address: str) -> None:
    assert without_credentials(address) == address
    assert redact(f"tracking:\n  uri: {address}\n") == f"tracking:\n  uri: {address}\n"


def test_credentials_are_removed_from_text() -> None:
    text = "from 'http://user:PLANTED@host/a' to http://other/b, see https://u:PLANTED@third. password=PLANTED host=db"
    assert redact(text) == "from 'http://host/a' to http://other/b, see https://third. password=*** host=db"


def test_the_hint_how_to_see_mlflow_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert summary.open_mlflow(settings_for("sqlite:///a.db")) == "mlflow ui --backend-store-uri sqlite:///a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:PLANTED@host/db")
    settings = settings_for()
    assert uri.public_uri(settings) == "postgresql://host/db"
    assert summary.open_mlflow(settings) == 'MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI" mlflow ui'
    assert "PLANTED" not in summary.run_link(settings, "1", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:PLANTED@host")
    assert summary.run_link(settings, "1", "abc") == "[run abc](https://host/#/experiments/1/runs/abc)"


@pytest.mark.parametrize("line", ["uri: http://user:PLANTED@host: x", "http://user:PLANTED@host"])
def test_a_parameter_file_that_cannot_be_read_is_quoted_without_credentials(tmp_path: Path, line: str) -> None:
    (tmp_path / "params.yaml").write_text(f"tracking:\n  {line}\n")
    with pytest.raises(UserError) as error:
        settings_file.load(tmp_path / "params.yaml")
    assert "//host" in str(error.value)
    assert "PLANTED" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["http://user:{}@127.0.0.1:{}", "http://us er:x/{}@127.0.0.1:{}", "nonsense://u:{}@h"]
)
def test_an_error_names_the_server_without_credentials(
    paths: Paths, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^MLflow at ") as error:
        connection.configure(settings_for(address.format(PASSWORD, free_port())), paths)
    assert PASSWORD not in "".join(traceback.format_exception(error.value))
    assert PASSWORD not in "".join(capfd.readouterr())


def test_credentials_go_to_their_own_server_alone(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(errors.UnavailableError):
        connection.configure(settings_for(f"http://{USER}:a%40b@127.0.0.1:{free_port()}"), paths)
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (USER, "a@b")
    with pytest.raises(errors.UnavailableError):
        connection.configure(settings_for(f"http://127.0.0.1:{free_port()}"), paths)
    assert not {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} & os.environ.keys()


@pytest.mark.slow
def test_a_run_is_recorded_on_a_server_that_asks_for_a_password(
    paths: Paths, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path_factory.mktemp("store")
    server = Server(store)
    try:
        with authenticating_proxy(server.port) as port:
            with pytest.raises(UserError, match=f"MLflow at http://127.0.0.1:{port} refuses"):
                connection.configure(settings_for(f"http://{USER}:wrong@127.0.0.1:{port}"), paths)
            settings = settings_for(f"http://{USER}:{PASSWORD}@127.0.0.1:{port}")
            with runs.training_run(settings, paths, "train", paths.state / "points.jsonl") as run:
                pass
            assert mlflow.get_run(run.id).data.params["tracking.uri"] == f"http://127.0.0.1:{port}"
    finally:
        server.kill()
    assert PASSWORD not in "".join(capfd.readouterr())
    with closing(sqlite3.connect(store / "mlflow.db")) as connection_to_store:
        assert PASSWORD not in "".join(connection_to_store.iterdump())
