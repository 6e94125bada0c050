"""What the registry says of the model that lies here. Reads only, and without PyTorch, so that it answers soon."""

import json
from typing import NamedTuple

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import connection, errors
from tasks.tracking.uri import tracking_uri


class RegistryStatus(NamedTuple):
    """A registered version, its aliases, and what the gate said of it."""

    version: int
    aliases: tuple[str, ...]
    gate: str | None  # "passed" or "failed"; None: not judged
    reasons: tuple[str, ...]
    settled: bool  # judged, and by the present `promote` settings
    experiment_id: str
    run_id: str  # of the training


def aliases(settings: Settings, paths: Paths) -> dict[str, int]:
    """Alias -> version of the registered model; empty if there is none. Raises UserError if MLflow does not answer."""
    database = tracking_uri(settings).removeprefix("sqlite:///")
    if database != tracking_uri(settings) and not (paths.root / database).exists():
        return {}  # asking would make one
    connection.configure(settings, paths)
    from mlflow import MlflowClient

    with errors.readable_errors():
        models = MlflowClient().search_registered_models(f"name = '{settings.promote.model_name}'")
    return {alias: int(version) for model in models for alias, version in model.aliases.items()}


def registry_status(settings: Settings, paths: Paths) -> RegistryStatus | None:
    """How the evaluated model stands in the registry; None if it is not evaluated or not registered.

    A version is this model if weights, data and evaluation are the same.

    Raises:
        UserError: MLflow does not answer.
    """
    if not paths.robustness.is_file():
        return None
    robustness = json.loads(paths.robustness.read_text(encoding="utf-8"))
    identity = {
        "weights_sha256": robustness["models"]["target"]["weights_sha256"],
        "data_hash": robustness["data"]["hash"],
        "evaluation_hash": robustness["settings_hash"],
    }
    held = aliases(settings, paths)
    if not held:
        return None
    from mlflow import MlflowClient

    wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in identity.items())
    with errors.readable_errors():
        found = MlflowClient().search_model_versions(f"name = '{settings.promote.model_name}' and {wanted}")
        if not found:
            return None
        newest = max(found, key=lambda version: int(version.version))
        assert newest.run_id is not None, "registry.register gives every version its run"
        run = MlflowClient().get_run(newest.run_id)
    return RegistryStatus(
        version=int(newest.version),
        aliases=tuple(sorted(alias for alias, version in held.items() if version == int(newest.version))),
        gate=newest.tags.get("gate"),
        reasons=tuple(newest.tags.get("gate_reasons", "").splitlines()),
        settled=newest.tags.get("gate_settings") == settings.hash("promote"),
        experiment_id=run.info.experiment_id,
        run_id=run.info.run_id,
    )
