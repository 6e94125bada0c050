"""MLflow: where it is, and one run for each training.

Tracking only observes. It must answer when a training begins or continues; after that no training waits for it or is
lost to it. `shipping` sends the points when it can, and `recording` fills in whatever is missing at the end.
"""

import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2r_core import runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.tracking import errors, metric_uploader, system_metrics
from tasks.tracking.lineage import Lineage, current_lineage
from tasks.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"

# How long the end of a training waits for a server that does not take its last points.
FINISH_SECONDS = 30.0
STOP_SECONDS = 5.0  # a spot machine's notice is short, and a training that is stopped continues


class UnavailableError(UserError):
    """The server does not answer, or its database is locked: trying again may help."""


class TrainingRun(NamedTuple):
    """An MLflow run; its id is empty in a process that tracks nothing."""

    id: str


def configure(settings: Settings, paths: Paths) -> None:
    """Point MLflow at the tracking server and make sure that the experiment is there.

    The variable MLFLOW_TRACKING_URI wins over `tracking.uri`; a relative sqlite path starts at the project's root. A
    fresh sqlite database is initialised once, however many processes arrive at the same time.

    Raises:
        UnavailableError: the server does not answer within seconds.
        UserError: the database or the experiment cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own 7 retries would take 4 minutes to say that the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    uri = tracking_uri(settings)
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
def training_run(settings: Settings, paths: Paths, stage: str, points: Path) -> Iterator[TrainingRun]:
    """Run a training stage ("pretrain" or "train") as an MLflow run with its settings, data, lineage and points.

    What the training appends to the file `points` (see `progress`) reaches the run from a thread. A training that
    continues, beside whose points a run is noted, continues that run too, if it is still there. The run ends FINISHED,
    KILLED on KeyboardInterrupt, or FAILED on any other exception. A server that goes away during the training costs a
    warning and `FINISH_SECONDS` at the end, not the training. The prepared data must exist.

    Raises:
        UserError: as `configure`: nothing is trained before the server has answered.
    """
    try:
        configure(settings, paths)
    except UnavailableError as error:
        raise UnavailableError(f"{error} A training needs it when it begins or continues, not after that.") from error
    status = "FAILED"
    # Short and single requests: what fails is tried again by the thread.
    timeout = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=timeout, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        try:
            with readable_errors():
                run_id = _begin_or_continue(settings, paths, stage, points)
            with _shipped(settings, run_id, points):
                yield TrainingRun(run_id)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            _end(status)


@contextmanager
def silent() -> Iterator[TrainingRun]:
    """What the ranks other than 0 have in the place of a run."""
    yield TrainingRun("")


def find(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, unless this server does not know it or it was deleted there."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def begin(settings: Settings, paths: Paths, stage: str, made_from: Lineage, **tags: str) -> str:
    """Start a run in this thread with parameters, data set and lineage; returns its id. `mlflow.end_run` ends it."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    manifest = read_manifest(paths)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None, "configure() comes first"
    run = mlflow.start_run(
        experiment_id=experiment.experiment_id,
        run_name=f"{stage} {manifest['source']}",
        tags={"stage": stage, **_tags(made_from), **tags},
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


def _begin_or_continue(settings: Settings, paths: Paths, stage: str, points: Path) -> str:
    import mlflow

    made_from = current_lineage(settings, paths)
    noted = metric_uploader.read_note(points)
    if noted is None or find(mlflow.MlflowClient(), noted.run_id) is None:
        return begin(settings, paths, stage, made_from)
    mlflow.start_run(noted.run_id, tags=_tags(made_from))
    return noted.run_id


def _tags(made_from: Lineage) -> dict[str, str]:
    return {
        "git_commit": made_from.git_commit,
        "git_dirty": str(made_from.git_dirty).lower(),
        "data_hash": made_from.data_hash,
        "settings_hash": made_from.settings_hash,
        "d2r_version": _version(),
    }


@contextmanager
def _shipped(settings: Settings, run_id: str, points: Path) -> Iterator[None]:
    """Send the points to the run during the block, and on a GPU the machine's metrics beside them."""
    import mlflow

    on_gpu = runtime.device(settings.runtime.device).type == "cuda"
    with system_metrics.monitor(run_id) if on_gpu else nullcontext(lambda: None) as watch:
        shipment = metric_uploader.Shipment(mlflow.MlflowClient(), run_id, points, watch)
        seconds, then = STOP_SECONDS, "when the training continues"
        try:
            yield
            seconds, then = FINISH_SECONDS, "when the model is registered"
        finally:
            if missing := shipment.finish(seconds):
                _log.warning("MLflow does not have %d points of this training yet; they are sent %s.", missing, then)


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
        chain = list(errors.chain(error))
        if any(map(_may_pass, chain)):
            raise UnavailableError(
                f"MLflow at {mlflow.get_tracking_uri()} does not answer ({errors.first_line(chain[-1])}). Start it, or "
                "correct tracking.uri in params.yaml or the variable MLFLOW_TRACKING_URI."
            ) from error
        raise UserError(f"MLflow at {mlflow.get_tracking_uri()} refuses: {errors.first_line(error)}") from error


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


def _end(status: str) -> None:
    import mlflow

    try:
        mlflow.end_run(status)
    except Exception as error:  # whatever it is, the training has ended
        _log.warning("MLflow could not end the run as %s: %s", status, errors.first_line([*errors.chain(error)][-1]))


def _version() -> str:
    try:
        return metadata.version("d2r")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _may_pass(error: BaseException) -> bool:
    """Whether it is the network, or a locked database."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return bool(error.error_code == "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.RetryError)
