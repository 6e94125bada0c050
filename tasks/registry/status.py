"""The state of the registry, and of the evaluated model in it. Reads only, and without PyTorch: it answers soon."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import Identity, RobustnessReport
from tasks.pipeline import dvc
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
    settled: bool  # judged, by the present `promote` settings and beside the present champion
    experiment_id: str
    run_id: str  # of the training
    approval: Approval | None = None  # None: nobody was asked
    on_hold: bool = False  # this version, or another one of the same weights

    @property
    def decided(self) -> bool:
        """Whether a run would leave the version as it is: it is champion, or the gate or a person does not want that.

        A version that passed the gate and is not champion for another reason is a promotion that was interrupted, or
        one that nobody answered in time: the next run tries again.
        """
        if "champion" in self.aliases:
            return True
        if not self.settled:
            return False
        return self.gate == "failed" or self.on_hold or self._answered_or_waiting()

    def _answered_or_waiting(self) -> bool:
        if self.approval is None:
            return False
        if self.approval.state == "waiting":
            return datetime.fromisoformat(self.approval.time) > datetime.now(UTC)
        return self.approval.state == "rejected"


def finished(settings: Settings, paths: Paths) -> RegistryStatus | None:
    """The evaluated model's version if a run would change nothing; None if there is something to do.

    It would change nothing if every stage is up to date and the version is `decided`.

    Raises:
        BusyError: a stage is running.
        UserError: `dvc status` failed, MLflow does not answer, or robustness.json cannot be read.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        changed = pool.submit(dvc.status, paths)
        import_mlflow(settings, paths)
        if changed.result():
            return None
    registered = registry_status(settings, paths)
    return registered if registered and registered.decided else None


def import_mlflow(settings: Settings, paths: Paths) -> None:
    """Import MLflow if its store exists: beside a process of DVC's, this takes no time of its own."""
    if store_exists(settings, paths):
        connection.set_defaults()
        import mlflow  # noqa: F401


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
        weights = newest.tags.get("weights_sha256")
        same = MlflowClient().search_model_versions(f"name = '{newest.name}' and tags.weights_sha256 = '{weights}'")
    return RegistryStatus(
        version=int(newest.version),
        aliases=tuple(sorted(alias for alias, version in versions.items() if version == int(newest.version))),
        gate=newest.tags.get("gate"),
        reasons=tuple(newest.tags.get("gate_reasons", "").splitlines()),
        settled=newest.tags.get("gate_settings") == settings.hash("promote") and _compared_with(newest, versions),
        experiment_id=run.info.experiment_id,
        run_id=run.info.run_id,
        approval=Approval.of(newest),
        on_hold=any("hold" in version.tags for version in same),
    )


def _compared_with(version: "ModelVersion", versions: dict[str, int]) -> bool:
    """Whether the gate compared the version with the present champion, or did not say with which."""
    decision = json.loads(version.tags.get("decision", "{}"))
    return "champion" not in decision or decision["champion"] == versions.get("champion")


def newest_version(client: "MlflowClient", name: str, identity: Identity) -> "ModelVersion | None":
    """The newest version of the registered model `name` whose tags carry this identity."""
    tags = " and ".join(f"tags.{key} = '{value}'" for key, value in identity)
    versions = client.search_model_versions(f"name = '{name}' and {tags}")
    return max(versions, key=lambda version: int(version.version), default=None)


def identity_of(version: "ModelVersion") -> Identity:
    """The identity in the tags of a version; empty where it was not registered by `d2r`."""
    return Identity(**{key: version.tags.get(key, "") for key in Identity.model_fields})
