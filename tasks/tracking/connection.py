"""The connection to MLflow: its address, its database and the experiment."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import errors
from tasks.tracking.uri import tracking_uri

_SQLITE = "sqlite:///"
_HTTP = ("http://", "https://")
_credentials: dict[str, str] = {}  # variables that were set because the server's address had user or password


def configure(settings: Settings, paths: Paths) -> None:
    """Point MLflow at the tracking server and create the experiment if it does not exist.

    User and password in a server's address go into the variables from which MLflow reads them, since it prints and
    records the address.

    The variable MLFLOW_TRACKING_URI takes precedence over `tracking.uri`; a relative sqlite path starts at the
    project's root. A new sqlite database is initialised once, however many processes arrive at the same time.

    Raises:
        UnavailableError: the server does not answer within seconds.
        UserError: the database or the experiment cannot be used.
    """
    set_defaults()
    import mlflow

    uri = tracking_uri(settings)
    if uri.startswith(_HTTP):
        uri = _move_credentials_to_environment(uri)
    elif uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{paths.root.resolve() / uri.removeprefix(_SQLITE)}"
    # MLflow writes the address into the environment, where the next call would mistake it for the user's choice.
    with environment(MLFLOW_TRACKING_URI=uri):
        mlflow.set_tracking_uri(uri)
    name, artifacts = settings.tracking.experiment, (paths.root.resolve() / "mlruns").as_uri()
    with errors.readable_errors():
        if uri.startswith(_SQLITE):
            with _locked(_database(uri)):
                _ensure_experiment(name, artifacts)
        elif uri.startswith(_HTTP):
            # A server that swallows packets would cost two minutes at each attempt.
            with environment(MLFLOW_HTTP_REQUEST_TIMEOUT=os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
                _ensure_experiment(name, None)  # the server decides where artifacts go
        else:
            _ensure_experiment(name, artifacts)


def set_defaults() -> None:
    """Set the variables of MLflow that the user has not set. Comes before the first import of MLflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own 7 retries would take 4 minutes to report that the server is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _move_credentials_to_environment(uri: str) -> str:
    """The server's address without user and password; those of the address before it are forgotten."""
    for name, value in _credentials.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _credentials.clear()
    parts = urlsplit(uri)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    given = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    _credentials.update({name: value for name, value in given.items() if value})
    os.environ.update(_credentials)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the block and restore their previous values after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ensure_experiment(name: str, artifacts: str | None) -> None:
    """Create the experiment, with its artifacts at that URI, if it does not exist."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
    elif experiment.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment {name!r} is deleted. Restore it with `mlflow experiments restore -x "
            f"{experiment.experiment_id}`, or name another in params.yaml."
        )


@contextmanager
def exclusive() -> Iterator[None]:
    """One process at a time where MLflow's store is a sqlite database; on a server, no more than it guarantees itself.

    `configure` comes first.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    with _locked(_database(uri)) if uri.startswith(_SQLITE) else nullcontext():
        yield


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE).partition("?")[0])


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """Hold the lock file beside a writable sqlite database.

    MLflow's migration of a new database crashes when two processes run it at once, and MLflow retries a broken one for
    two minutes.
    """
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.with_name(f"{database.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with closing(sqlite3.connect(database, timeout=60)) as connection:
                connection.execute("BEGIN IMMEDIATE")
            yield
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"{database}: cannot be used as MLflow's database ({error}). Move it away, or correct tracking.uri."
        ) from None
