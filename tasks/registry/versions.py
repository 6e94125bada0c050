"""Versions in the model registry: registered as @challenger, looked up, downloaded."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2r_core import checkpoint
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import history, integrity, model_logging, signing, version_files
from tasks.registry.lock import registry_lock
from tasks.registry.model_logging import LoggedModel
from tasks.registry.provenance import PrefectRun
from tasks.registry.status import newest_version
from tasks.tracking import connection, errors
from tasks.tracking.uri import public_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def register(settings: Settings, paths: Paths, prefect_run: PrefectRun | None = None) -> int:
    """Register the evaluated target model and make it @challenger; returns its version.

    Figures, files and the servable model go to the run that trained it, or, where this server does not know that
    run, to a new one made from the files. The version is created last: a failure before leaves none. A model that is
    registered already, with the same identity, keeps its version, unless a signature is required that it does not
    have. One process at a time registers: see `lock`. The history gets the move of the alias.

    Args:
        prefect_run: the flow run that registers it, if there is one, for the provenance.

    Raises:
        UserError: an artifact is missing, the artifacts do not belong together, the files of the version that is
            registered already are not the ones that were registered, or it cannot be signed as required.
    """
    metadata, robustness = _evaluated(paths)
    name, public_key = settings.promote.model_name, signing.trusted_key(settings, paths)
    signing.check_keys(public_key)
    with connect(settings, paths) as client, registry_lock(client, name):
        registered = newest_version(client, name, robustness.identity)
        if registered is None or not _is_usable(registered, public_key):
            logged = model_logging.log_evaluated_model(client, settings, paths, metadata, robustness, prefect_run)
            version = _create_version(client, name, logged, _tags(metadata, robustness))
        else:
            version = int(registered.version)
        _make_challenger(client, name, version)
    return version


def _make_challenger(client: "MlflowClient", name: str, version: int) -> None:
    """Move @challenger; the lock must be held."""
    history.repair(client, name)
    if resolve_alias(client, name, history.CHALLENGER) != version:
        move = history.Move(
            to_version=version,
            who=history.local_user(),
            command="register",
            reason="It was evaluated last.",
            run_id=client.get_model_version(name, str(version)).run_id or None,
            alias=history.CHALLENGER,
        )
        history.record_and_move(client, name, move)


def champion(settings: Settings, paths: Paths) -> int | None:
    """The version that is @champion, if any."""
    with connect(settings, paths) as client:
        return resolve_alias(client, settings.promote.model_name, "champion")


def download(settings: Settings, paths: Paths, reference: str, folder: Path) -> Path:
    """Bring the checkpoint of `models:/NAME@ALIAS` or `models:/NAME/VERSION` into `folder`; returns its weights' path.

    Raises:
        UserError: the reference is not of that form, there is no such version, or its files are not the ones that were
            registered.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@(\w+)|/(\d+))", reference)
    if not parts:
        raise UserError(f"{reference}: write models:/NAME@champion, models:/NAME@challenger or models:/NAME/VERSION.")
    name, alias, number = parts.groups()
    with connect(settings, paths) as client:
        version = resolve_alias(client, name, alias) if alias else int(number)
        registered = None if version is None else find_version(client, name, version)
        if registered is None:
            raise UserError(f"{reference}: there is no such version in MLflow ({public_uri(settings)}).")
        with tempfile.TemporaryDirectory() as temporary:
            files = version_files.read(registered, Path(temporary), signing.trusted_key(settings, paths))
            folder.mkdir(parents=True, exist_ok=True)
            for path in (checkpoint.metadata_path(files.weights), files.weights):
                shutil.copy(path, folder)
    return folder / files.weights.name


@contextmanager
def connect(settings: Settings, paths: Paths) -> Iterator["MlflowClient"]:
    """MLflow's client; what the server refuses inside the block becomes one message."""
    connection.configure(settings, paths)
    import mlflow

    with errors.readable_errors():
        yield mlflow.MlflowClient()


def resolve_alias(client: "MlflowClient", name: str, alias: str) -> int | None:
    """The version of the registered model `name` that has an alias; None without one."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if version is None else int(version)


def find_version(client: "MlflowClient", name: str, version: int) -> "ModelVersion | None":
    """A version of the registered model `name`; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def get_referenced(client: "MlflowClient", name: str, reference: str) -> "ModelVersion":
    """The version that a person names by its number or an alias: "6", "champion" or "@champion".

    Raises:
        UserError: there is none.
    """
    alias = reference.removeprefix("@")
    number = int(reference) if reference.isdecimal() else resolve_alias(client, name, alias)
    registered = None if number is None else find_version(client, name, number)
    if registered is None:
        missing = f"version {number}" if reference.isdecimal() else f"version @{alias}"
        raise UserError(f"{name} has no {missing}. `d2r models` lists them.")
    return registered


def _evaluated(paths: Paths) -> tuple[dict[str, Any], RobustnessReport]:
    """The target checkpoint's JSON and robustness.json, once everything is there and belongs together."""
    for path in (paths.report, paths.model_card, paths.robustness, paths.examples, paths.validation, paths.target):
        if not path.exists():
            raise UserError(f"{path} is missing. `d2r run` makes it.")
    metadata = checkpoint.read_metadata(paths.target)
    robustness = RobustnessReport.read(paths.robustness)
    if robustness.target.weights_sha256 != metadata["weights_sha256"]:
        raise UserError(f"{paths.robustness}: was measured on other weights than {paths.target}. Run `dvc repro`.")
    if not robustness.data.hash == metadata["data_hash"] == read_manifest(paths)["hash"]:
        raise UserError(
            f"{paths.robustness}, {paths.target} and {paths.manifest} are of different data. Run `dvc repro`."
        )
    return metadata, robustness


def _is_usable(version: "ModelVersion", public_key: Path | None) -> bool:
    """Whether a version can be promoted as far as its form goes: an older release wrote no manifest or signature.

    Raises:
        UserError: its files are not the ones that were registered.
    """
    if integrity.TAG not in version.tags:
        return False
    try:
        integrity.verify(version, public_key)
    except signing.SignatureError:  # not signed, or before the key was changed
        return False
    return True


def _tags(metadata: dict[str, Any], robustness: RobustnessReport) -> dict[str, str]:
    """What a version says of itself, for people and for searches; the gate reads the verified files."""
    attacks, checks = robustness.target.attacks, robustness.target.checks
    tags = {
        **robustness.identity.model_dump(),
        "git_commit": metadata["git_commit"],
        "git_dirty": str(metadata["git_dirty"]).lower(),
        "settings_hash": metadata["settings_hash"],
        "collapsed": str(metadata["collapsed"]).lower(),
        "clean_accuracy": str(attacks["clean"].accuracy),
        "robust_accuracy": str(attacks["worst"].accuracy),
        "eps": str(attacks["worst"].eps),
        "checks": ", ".join(check.key for check in checks if check.passed is False) or "passed",
    }
    if "autoattack" in attacks:
        tags["autoattack"] = f"{attacks['autoattack'].name} on {attacks['autoattack'].images} images"
        tags["autoattack_accuracy"] = str(attacks["autoattack"].accuracy)
    return tags


def _create_version(client: "MlflowClient", name: str, logged: LoggedModel, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{logged.model_id}"
    tags = {**tags, integrity.TAG: logged.manifest_sha256}
    version = client.create_model_version(name, source, logged.run_id, tags=tags, model_id=logged.model_id)
    return int(version.version)
