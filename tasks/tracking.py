"""MLflow: where it is, and one run for each training.

Tracking only observes. It must answer when a run begins; after that a training is never lost to it, and `registry`
fills in from the history files whatever it missed.
"""

import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from d2r_core.errors import UserError
from tasks import lineage
from tasks.lineage import Lineage
from tasks.paths import Paths
from tasks.settings import Settings

_log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"


class UnavailableError(UserError):
    """The server does not answer, or its database is locked: trying again may help."""


class TrainingRun(NamedTuple):
    """An MLflow run: its id, and `log(metrics, step)`."""

    id: str
    log: Callable[[Mapping[str, float], int], None]


def configure(settings: Settings, paths: Paths) -> None:
    """Point MLflow at the tracking server and make sure that the experiment is there.

    The variable MLFLOW_TRACKING_URI wins over `tracking.uri`; a relative sqlite path starts at the project's root. A
    fresh sqlite database is initialised once, however many processes arrive at the same time.

    Raises:
        UnavailableError: the server does not answer within seconds.
        UserError: the database or the experiment cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own 7 retries would hold a training up for 4 minutes at every epoch that the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{paths.root.resolve() / uri.removeprefix(_SQLITE)}"
    # MLflow writes the address into the environment, where the next call would take it for the user's word.
    with _environment(MLFLOW_TRACKING_URI=uri):
        mlflow.set_tracking_uri(uri)
    name, artifacts = settings.tracking.experiment, (paths.root.resolve() / "mlruns").as_uri()
    with readable_errors():
        if uri.startswith(_SQLITE):
            with _locked(Path(uri.removeprefix(_SQLITE).partition("?")[0])):
                _ensure_experiment(name, artifacts)
        elif uri.startswith(("http://", "https://")):
            # A server that swallows packets would cost two minutes at each attempt.
            with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
                _ensure_experiment(name, None)  # the server decides where artifacts go
        else:
            _ensure_experiment(name, artifacts)


@contextmanager
def training_run(settings: Settings, paths: Paths, stage: str) -> Iterator[TrainingRun]:
    """Run a training stage ("pretrain" or "train") as an MLflow run with its settings, data and lineage.

    The run ends FINISHED, KILLED on KeyboardInterrupt, or FAILED on any other exception. A server that goes away
    during the training costs a warning, not the training. The prepared data must exist.

    Raises:
        UserError: as `configure`.
    """
    configure(settings, paths)
    status = "FAILED"
    try:
        with readable_errors():
            run_id = begin(settings, paths, stage, lineage.of(settings, paths))
        yield TrainingRun(run_id, lambda metrics, step: _log_metrics(run_id, metrics, step))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end(status)


def begin(settings: Settings, paths: Paths, stage: str, made_from: Lineage, **tags: str) -> str:
    """Start a run in this thread with parameters, data set and lineage; returns its id. `mlflow.end_run` ends it."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    manifest = lineage.manifest(paths)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None, "configure() comes first"
    run = mlflow.start_run(
        experiment_id=experiment.experiment_id,
        run_name=f"{stage} {manifest['source']}",
        tags={
            "stage": stage,
            "git_commit": made_from.git_commit,
            "git_dirty": str(made_from.git_dirty).lower(),
            "data_hash": made_from.data_hash,
            "settings_hash": made_from.settings_hash,
            "d2r_version": _version(),
            **tags,
        },
    )
    mlflow.log_params(settings.flat())
    dataset = Dataset(
        name=manifest["source"],
        digest=manifest["hash"][:36],  # the longest that MLflow takes; the tag has all of it
        source_type="local",
        source=json.dumps({"uri": str(paths.prepared)}),
        profile=json.dumps({key: manifest[key] for key in ("source", "path", "image_size", "classes", "splits")}),
    )
    context = InputTag(MLFLOW_DATASET_CONTEXT, "training")
    client.log_inputs(run.info.run_id, datasets=[DatasetInput(dataset, [context])])
    return str(run.info.run_id)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what the tracking server or its database refuses into one message.

    Raises:
        UnavailableError: when trying again may help.
        UserError: for everything else that MLflow reports.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        causes = list(_causes(error))
        if any(map(_may_pass, causes)):
            raise UnavailableError(
                f"MLflow at {mlflow.get_tracking_uri()} does not answer ({_first_line(causes[-1])}). Start it, or "
                "correct tracking.uri in params.yaml or the variable MLFLOW_TRACKING_URI."
            ) from error
        raise UserError(f"MLflow at {mlflow.get_tracking_uri()} refuses: {_first_line(error)}") from error


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the block and put back what was there."""
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
    """Create the experiment, with its artifacts at that URI, if it is not there."""
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
def _locked(database: Path) -> Iterator[None]:
    """Hold the lock file beside an sqlite database that can be written.

    MLflow's migration of a fresh database crashes when two processes meet in it, and MLflow tries a broken one for
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


def _log_metrics(run_id: str, metrics: Mapping[str, float], step: int) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.log_metrics(dict(metrics), step=step, run_id=run_id)
    except MlflowException as error:
        _log.warning("MLflow did not take the metrics of step %d: %s", step, _first_line([*_causes(error)][-1]))


def _end(status: str) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.end_run(status)
    except MlflowException as error:
        _log.warning("MLflow could not end the run as %s: %s", status, _first_line([*_causes(error)][-1]))


def _version() -> str:
    try:
        return metadata.version("d2r")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it comes from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_pass(error: BaseException) -> bool:
    """Whether it is the network, or a locked database."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return bool(error.error_code == "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.RetryError)
