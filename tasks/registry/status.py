"""The state of the registry, and of the evaluated model in it. Reads only, and without PyTorch: it answers soon."""

from typing import TYPE_CHECKING, NamedTuple

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import Identity, RobustnessReport
from tasks.registry import history
from tasks.registry.decision import Approval
from tasks.tracking import connection, errors
from tasks.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class RegistryStatus(NamedTuple):
    """A registered version, its aliases, and the gate's verdict on it."""

    version: int
    aliases: tuple[str, ...]
    gate: str | None  # "passed" or "failed"; None: not judged
    reasons: tuple[str, ...]
    settled: bool  # judged, and by the present `promote` settings
    experiment_id: str
    run_id: str  # of the training
    approval: Approval | None = None  # None: nobody was asked


def aliases(settings: Settings, paths: Paths) -> dict[str, int]:
    """Alias -> version of the registered model; empty if there is none. Raises UserError if MLflow does not answer."""
    if not store_exists(settings, paths):
        return {}
    connection.configure(settings, paths)
    from mlflow import MlflowClient

    with errors.readable_errors():
        models = MlflowClient().search_registered_models(f"name = '{settings.promote.model_name}'")
    return {alias: int(version) for model in models for alias, version in model.aliases.items()}


def all_versions(settings: Settings, paths: Paths) -> list["ModelVersion"]:
    """Every version of the registered model, the newest first. Raises UserError if MLflow does not answer."""
    if not store_exists(settings, paths):
        return []
    connection.configure(settings, paths)
    from mlflow import MlflowClient

    with errors.readable_errors():
        client, token = MlflowClient(), None
        versions: list[ModelVersion] = []
        while True:
            page = client.search_model_versions(f"name = '{settings.promote.model_name}'", page_token=token)
            versions += page
            token = page.token
            if not token:
                return sorted(versions, key=lambda version: int(version.version), reverse=True)


def read_history(settings: Settings, paths: Paths, alias: str | None = history.ALIAS) -> list[history.Entry]:
    """Every move of @champion, or of another alias (None: of every one), oldest first.

    Raises:
        UserError: MLflow does not answer.
    """
    if not store_exists(settings, paths):
        return []
    connection.configure(settings, paths)
    from mlflow import MlflowClient

    with errors.readable_errors():
        return history.entries(MlflowClient(), settings.promote.model_name, alias)


def store_exists(settings: Settings, paths: Paths) -> bool:
    """False where MLflow's database is a file that is not there yet: a request would create it."""
    database = tracking_uri(settings).removeprefix("sqlite:///")
    return database == tracking_uri(settings) or (paths.root / database).exists()


def registry_status(settings: Settings, paths: Paths) -> RegistryStatus | None:
    """The newest version of the evaluated model; None if it is not evaluated or not registered.

    Raises:
        UserError: MLflow does not answer, or robustness.json cannot be read.
    """
    if not paths.robustness.is_file():
        return None
    identity = RobustnessReport.read(paths.robustness).identity
    versions = aliases(settings, paths)
    if not versions:
        return None
    from mlflow import MlflowClient

    with errors.readable_errors():
        newest = newest_version(MlflowClient(), settings.promote.model_name, identity)
        if newest is None:
            return None
        assert newest.run_id is not None, "versions.register gives every version its run"
        run = MlflowClient().get_run(newest.run_id)
    return RegistryStatus(
        version=int(newest.version),
        aliases=tuple(sorted(alias for alias, version in versions.items() if version == int(newest.version))),
        gate=newest.tags.get("gate"),
        reasons=tuple(newest.tags.get("gate_reasons", "").splitlines()),
        settled=newest.tags.get("gate_settings") == settings.hash("promote"),
        experiment_id=run.info.experiment_id,
        run_id=run.info.run_id,
        approval=Approval.of(newest),
    )


def newest_version(client: "MlflowClient", name: str, identity: Identity) -> "ModelVersion | None":
    """The newest version of the registered model `name` whose tags carry this identity."""
    tags = " and ".join(f"tags.{key} = '{value}'" for key, value in identity)
    versions = client.search_model_versions(f"name = '{name}' and {tags}")
    return max(versions, key=lambda version: int(version.version), default=None)


def identity_of(version: "ModelVersion") -> Identity:
    """The identity in the tags of a version; empty where it was not registered by `d2r`."""
    return Identity(**{key: version.tags.get(key, "") for key in Identity.model_fields})
