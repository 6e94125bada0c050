"""What the registry no longer needs: versions that nothing refers to, and the runs and logged models behind them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import history, model_logging, moves
from tasks.registry.lock import registry_lock
from tasks.registry.status import identity_of
from tasks.registry.versions import connect
from tasks.tracking import chain_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import FileInfo, LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

_DAY = 24 * 3600 * 1000  # in milliseconds, as MLflow counts
_TAG = "d2r.unused"  # of a run that is being deleted: a killed deletion is continued


@dataclass(frozen=True)
class Unused:
    """What may be deleted, with its size in bytes, and what the versions that stay depend on."""

    versions: "list[ModelVersion]"
    models: "list[tuple[LoggedModel, int]]"
    runs: "list[tuple[Run, int]]"
    dvc_locks: list[Path]  # dvc.lock of each version that stays, downloaded


def collect(settings: Settings, paths: Paths, keep_days: float, folder: Path, *, delete: bool) -> Unused:
    """Find what nothing refers to, and delete it if `delete` says so; one process at a time, see `lock`.

    A version stays if it has an alias, is in the history, is on hold, or is younger than `keep_days`. A run or a logged
    model stays if a version refers to it that stays, in this or any other registered model; if it has the data and the
    settings of such a version (its guidance); if it is younger, or has not ended. The parent run of a pass of the chain
    stays as long as a training below it does; an empty one goes once it is older.

    MLflow only marks what is deleted: its own command `mlflow gc` removes the files.

    Args:
        folder: where the `dvc.lock` files of the versions that stay are put.
    """
    with connect(settings, paths) as client, registry_lock(client, settings.promote.model_name):
        before = int(time.time() * 1000 - keep_days * _DAY)
        versions = _unused_versions(client, settings.promote.model_name, before)
        gone = {(version.name, version.version) for version in versions}
        staying = [
            version for version in _search(client.search_model_versions) if (version.name, version.version) not in gone
        ]
        experiment = client.get_experiment_by_name(settings.tracking.experiment)
        assert experiment is not None, "configure() comes first"
        unused = Unused(
            versions,
            _unused_models(client, experiment.experiment_id, staying, before),
            _unused_runs(client, experiment.experiment_id, staying, before),
            _dvc_locks(client, staying, folder),
        )
        if delete:
            _delete(client, unused)
    return unused


def _unused_versions(client: "MlflowClient", name: str, before: int) -> "list[ModelVersion]":
    entries = history.entries(client, name)
    moved = {number for entry in entries for number in (entry.move.from_version, entry.move.to_version)}
    models = client.search_registered_models(f"name = '{name}'")
    aliased = {int(version) for model in models for version in model.aliases.values()}
    return [
        version
        for version in _search(client.search_model_versions, filter_string=f"name = '{name}'")
        if int(version.version) not in moved | aliased
        and version.creation_timestamp < before
        and moves.hold_of(client, version) is None
    ]


def _unused_models(
    client: "MlflowClient", experiment_id: str, staying: "list[ModelVersion]", before: int
) -> "list[tuple[LoggedModel, int]]":
    used = {str(version.source).removeprefix("models:/") for version in staying}
    models = _search(client.search_logged_models, experiment_ids=[experiment_id])
    return [
        (model, _size(partial(client.list_logged_model_artifacts, model.model_id)))
        for model in models
        if model.model_id not in used and model.creation_timestamp < before
    ]


def _unused_runs(
    client: "MlflowClient", experiment_id: str, staying: "list[ModelVersion]", before: int
) -> "list[tuple[Run, int]]":
    from mlflow.entities import ViewType

    used = {version.run_id for version in staying}
    lineages = {(version.tags.get("data_hash"), version.tags.get("settings_hash")) for version in staying}

    def stays(run: "Run") -> bool:
        tags = run.data.tags
        related = (tags.get("data_hash"), tags.get("settings_hash")) in lineages
        return run.info.run_id in used or related or run.info.end_time is None or run.info.end_time >= before

    active = list(_search(client.search_runs, experiment_ids=[experiment_id]))
    unused = [run for run in active if not chain_runs.is_parent(run) and not stays(run)]
    unused += _unused_parents(active, {run.info.run_id for run in unused}, before)
    marked = _search(
        client.search_runs,
        experiment_ids=[experiment_id],
        filter_string=f"tags.`{_TAG}` = 'true'",
        run_view_type=ViewType.DELETED_ONLY,
    )
    return [(run, _size(partial(client.list_artifacts, run.info.run_id))) for run in [*unused, *marked]]


def _unused_parents(active: "list[Run]", unused: set[str], before: int) -> "list[Run]":
    """The older parents of passes of the chain below which no training stays.

    One that has no end and nothing below it was left by a process that was killed, or waits for its first training.
    """
    needed = {run.data.tags.get(chain_runs.PARENT) for run in active if run.info.run_id not in unused}
    return [
        run
        for run in active
        if chain_runs.is_parent(run)
        and run.info.run_id not in needed
        and (run.info.end_time or run.info.start_time + _DAY) < before
    ]


def _dvc_locks(client: "MlflowClient", staying: "list[ModelVersion]", folder: Path) -> list[Path]:
    locks = []
    for version in staying:
        evaluation = str(model_logging.evaluation_folder(identity_of(version)))
        path = f"{evaluation}/dvc.lock"
        if version.run_id and path in {entry.path for entry in client.list_artifacts(version.run_id, evaluation)}:
            target = folder / version.name / str(version.version)
            target.mkdir(parents=True)
            locks.append(Path(client.download_artifacts(version.run_id, path, str(target))))
    return locks


def _delete(client: "MlflowClient", unused: Unused) -> None:
    """The versions first: nothing that still is a version loses its files, whenever this is killed."""
    for version in unused.versions:
        client.delete_model_version(version.name, str(version.version))
    for model, _ in unused.models:
        client.delete_logged_model(model.model_id)
    for run, _ in unused.runs:
        if run.info.lifecycle_stage == "active":
            client.set_tag(run.info.run_id, _TAG, "true")
            client.delete_run(run.info.run_id)


def _search(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """All pages of one of MLflow's searches."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _size(entries: "Callable[[str | None], list[FileInfo]]", path: str | None = None) -> int:
    """The bytes of all files below `path`, as `entries` lists them."""
    return sum(_size(entries, entry.path) if entry.is_dir else int(entry.file_size or 0) for entry in entries(path))
