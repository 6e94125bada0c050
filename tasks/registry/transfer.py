"""Copies of a version in another registered model or on another server: an environment, such as staging or production.

A copy has the files, tags and figures of the original, so that its integrity is verified by the same manifest.
"""

import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import integrity, model_logging, moves, signing
from tasks.registry.lock import registry_lock
from tasks.registry.model_logging import LoggedModel
from tasks.registry.status import identity_of, newest_version
from tasks.registry.versions import connect
from tasks.tracking import connection
from tasks.tracking.uri import public_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion

TAG = "copied_from"
_STAYS = ("hold", "released", TAG)  # tags about the original alone
_POINTS = 1000  # of metrics in one request


@dataclass(frozen=True)
class _Original:
    """A version with its run, downloaded and verified."""

    version: "ModelVersion"
    run: "Run"
    metrics: "list[Metric]"
    model: Path  # the folder of the logged model
    artifacts: Path  # the artifacts of the run that belong to the version


def promote(
    settings: Settings,
    paths: Paths,
    version: int,
    *,
    name: str,
    server: str | None,
    who: str,
    reason: str,
    force: bool = False,
) -> int:
    """Copy a version to the registered model `name` and make it @champion there; returns its version there.

    What is there already is not copied again. The version is created last: a failure before leaves none, and a rerun
    finishes.

    Args:
        server: the address of another MLflow; None: the same one.

    Raises:
        RefusedError: the gate did not pass the version, or it is on hold, here or there; not with `force`.
        UserError: as `moves.promote`.
    """
    target = settings.model_copy(update={"promote": settings.promote.model_copy(update={"model_name": name})})
    with tempfile.TemporaryDirectory() as folder:
        with connect(settings, paths) as client:
            registered = moves.get_version(client, settings.promote.model_name, version)
            if not force:
                moves.refuse(client, registered)
            original = _fetch(client, registered, Path(folder), signing.trusted_key(settings, paths))
        origin = json.dumps({"model": registered.name, "version": version, "server": public_uri(settings)})
        # The variable decides about the address, also where a person has set it for the original.
        address: AbstractContextManager[None] = (
            connection.environment(MLFLOW_TRACKING_URI=server) if server else nullcontext()
        )
        with address:
            with connect(target, paths) as client, registry_lock(client, name):
                copy = _find_or_copy(client, target, original, origin, same_server=server is None)
            moves.promote(target, paths, copy, who=who, command="promote", reason=reason, force=force)
    return copy


def _fetch(client: "MlflowClient", version: "ModelVersion", folder: Path, public_key: Path | None) -> _Original:
    model, artifacts = folder / "model", folder / "artifacts"
    model.mkdir()
    artifacts.mkdir()
    integrity.fetch(version, model, public_key)
    (model / integrity.CLIENT_FILE).unlink(missing_ok=True)
    run = client.get_run(str(version.run_id))
    evaluation = model_logging.evaluation_folder(identity_of(version))
    for entry in client.list_artifacts(run.info.run_id):
        if not entry.is_dir:
            client.download_artifacts(run.info.run_id, entry.path, str(artifacts))
    (artifacts / evaluation.parent).mkdir()
    client.download_artifacts(run.info.run_id, str(evaluation), str(artifacts / evaluation.parent))
    metrics = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
    return _Original(version, run, metrics, model, artifacts)


def _find_or_copy(
    client: "MlflowClient", settings: Settings, original: _Original, origin: str, *, same_server: bool
) -> int:
    """The version of the copy; the registry's lock must be held."""
    from mlflow.exceptions import MlflowException

    name, tags = settings.promote.model_name, dict(original.version.tags)
    existing = newest_version(client, name, identity_of(original.version))
    if existing is not None and existing.tags.get(integrity.TAG) == tags[integrity.TAG]:
        return int(existing.version)
    if same_server:
        model_id = str(original.version.source).removeprefix("models:/")
        logged = LoggedModel(original.run.info.run_id, model_id, tags[integrity.TAG])
    else:
        logged = _copy_run(client, settings, original, origin)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    copied = {key: value for key, value in tags.items() if key not in _STAYS} | {TAG: origin}
    source = f"models:/{logged.model_id}"
    version = client.create_model_version(name, source, logged.run_id, tags=copied, model_id=logged.model_id)
    return int(version.version)


def _copy_run(client: "MlflowClient", settings: Settings, original: _Original, origin: str) -> LoggedModel:
    """The run of the original and its logged model, on this server."""
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None, "configure() comes first"
    for half in client.search_runs([experiment.experiment_id], f"tags.{TAG} = '{origin}' and status != 'FINISHED'"):
        client.delete_run(half.info.run_id)  # of a copy that was killed
    tags = {key: value for key, value in original.run.data.tags.items() if not key.startswith("mlflow.")}
    run = client.create_run(experiment.experiment_id, tags={**tags, TAG: origin}, run_name=original.run.info.run_name)
    run_id = run.info.run_id
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, value) for key, value in original.run.data.params.items()])
    for start in range(0, len(original.metrics), _POINTS):
        client.log_batch(run_id, original.metrics[start : start + _POINTS])
    client.log_artifacts(run_id, str(original.artifacts))
    model = client.create_logged_model(experiment.experiment_id, "model", run_id, params=dict(original.run.data.params))
    client.log_model_artifacts(model.model_id, str(original.model))
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run_id)
    return LoggedModel(run_id, model.model_id, original.version.tags[integrity.TAG])
