"""One MLflow run for each training, below that of its pass of the chain.

Tracking only observes. The server must answer when a training begins or continues; after that no training waits for it
or fails because of it. `metric_uploader` sends the points when it can, and registration sends whatever is missing.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2r_core import files, runtime
from tasks.config.credentials import without_credentials
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.tracking import chain_runs, connection, errors, metric_uploader, system_metrics
from tasks.tracking.lineage import Lineage, current_lineage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

# How long the end of a training waits for a server that does not take its last points.
FINISH_SECONDS = 30.0
STOP_SECONDS = 5.0  # a spot machine's notice is short, and a training that is stopped continues


class TrainingRun(NamedTuple):
    """An MLflow run; its id is empty in a process that tracks nothing."""

    id: str


@contextmanager
def training_run(settings: Settings, paths: Paths, stage: str, points: Path) -> Iterator[TrainingRun]:
    """Run a training stage ("pretrain" or "train") as an MLflow run with its settings, data, lineage and points.

    A thread sends what the training appends to the file `points` (see `metrics_log`). The run's id is saved beside it,
    so that a training that continues also continues its run, if that still exists. The run ends FINISHED, KILLED on
    KeyboardInterrupt, or FAILED on any other exception. A server that goes down during the training costs a warning and
    `FINISH_SECONDS` at the end, not the training. The prepared data must exist.

    Raises:
        UserError: as `connection.configure`: nothing is trained before the server has answered.
    """
    try:
        connection.configure(settings, paths)
    except errors.UnavailableError as error:
        message = f"{error} A training needs it when it begins or continues, not after that."
        raise errors.UnavailableError(message) from error
    status, run_id = "FAILED", ""
    # Short requests without retries: the thread sends what failed again.
    timeout = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with connection.environment(MLFLOW_HTTP_REQUEST_TIMEOUT=timeout, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        try:
            with errors.readable_errors():
                run_id = _begin_or_continue(settings, paths, stage, points)
            with _points_uploaded(settings, run_id, points):
                yield TrainingRun(run_id)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            _end(status, run_id)


@contextmanager
def silent() -> Iterator[TrainingRun]:
    """Stands in for `training_run` on all ranks but 0."""
    yield TrainingRun("")


def find(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run; None if this server does not know it or it was deleted there."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def begin(settings: Settings, paths: Paths, stage: str, lineage: Lineage, **tags: str) -> str:
    """Start a run with parameters, data set and lineage as this thread's active one; returns its id.

    `mlflow.end_run` ends it. `connection.configure` comes first.
    """
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    manifest = read_manifest(paths)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None, "configure() comes first"
    method = settings.train.method.name
    parent = _parent(settings, paths, lineage)
    run = mlflow.start_run(
        experiment_id=experiment.experiment_id,
        run_name=chain_runs.name(stage, manifest, "standard" if stage == "pretrain" else method),
        tags={"stage": stage, **_tags(lineage), **tags, chain_runs.PARENT: parent},
    )
    mlflow.log_params({**settings.flat(), "tracking.uri": without_credentials(settings.tracking.uri)})
    dataset = Dataset(
        name=manifest["source"],
        digest=manifest["hash"][:36],  # MLflow's longest; the tag has the whole hash
        source_type="local",
        source=json.dumps({"uri": str(paths.prepared)}),
        profile=json.dumps({key: manifest[key] for key in ("source", "path", "image_size", "classes", "splits")}),
    )
    context = InputTag(MLFLOW_DATASET_CONTEXT, "training")
    client.log_inputs(run.info.run_id, datasets=[DatasetInput(dataset, [context])])
    return str(run.info.run_id)


def _begin_or_continue(settings: Settings, paths: Paths, stage: str, points: Path) -> str:
    import mlflow

    lineage = current_lineage(settings, paths)
    run_id_file = points.with_name("mlflow.json")
    if run_id_file.exists():
        run_id = str(json.loads(run_id_file.read_text(encoding="utf-8"))["run_id"])
        if find(mlflow.MlflowClient(), run_id) is not None:
            mlflow.start_run(run_id, tags={**_tags(lineage), chain_runs.PARENT: _parent(settings, paths, lineage)})
            return run_id
    run_id = begin(settings, paths, stage, lineage)
    files.write_text(run_id_file, json.dumps({"run_id": run_id}))
    return run_id


def _parent(settings: Settings, paths: Paths, lineage: Lineage) -> str:
    """The run of this pass of the chain."""
    import mlflow

    client, manifest = mlflow.MlflowClient(), read_manifest(paths)
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None, "configure() comes first"
    run_name = chain_runs.name(chain_runs.STAGE, manifest, settings.train.method.name)
    return chain_runs.find_or_create(client, experiment.experiment_id, lineage, run_name, _tags(lineage))


def _tags(lineage: Lineage) -> dict[str, str]:
    return {
        "git_commit": lineage.git_commit,
        "git_dirty": str(lineage.git_dirty).lower(),
        "data_hash": lineage.data_hash,
        "settings_hash": lineage.settings_hash,
        "d2r_version": _version(),
    }


@contextmanager
def _points_uploaded(settings: Settings, run_id: str, points: Path) -> Iterator[None]:
    """Send the points to the run during the block, and on a GPU the machine's metrics as well."""
    import mlflow

    on_gpu = runtime.device(settings.runtime.device).type == "cuda"
    with system_metrics.monitor(run_id) if on_gpu else nullcontext(lambda: None) as start_monitor:
        upload = metric_uploader.BackgroundUpload(mlflow.MlflowClient(), run_id, points, start_monitor)
        seconds, when = STOP_SECONDS, "when the training continues"
        try:
            yield
            seconds, when = FINISH_SECONDS, "when the model is registered"
        finally:
            if unconfirmed := upload.finish(seconds):
                _log.warning(
                    "MLflow has not confirmed %d points of this training; missing ones are sent %s.", unconfirmed, when
                )


def _end(status: str, run_id: str) -> None:
    import mlflow

    try:
        mlflow.end_run(status)
    except Exception as error:  # whatever it is, the training has ended
        _log.warning("MLflow could not end the run as %s: %s", status, errors.root_cause(error))
    else:
        chain_runs.end(mlflow.MlflowClient(), run_id, status)


def _version() -> str:
    try:
        return metadata.version("d2r")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
