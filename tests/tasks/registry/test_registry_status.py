"""The state of the evaluated model in the registry."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import robustness_json

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import status
from tasks.registry.decision import Approval
from tasks.tracking import connection

IDENTITY = {"weights_sha256": "weights", "data_hash": "data", "evaluation_hash": "evaluation"}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A project whose target model is evaluated."""
    paths = Paths(tmp_path)
    evaluate(paths)
    return paths


def evaluate(paths: Paths, weights: str = "weights") -> None:
    robustness_json.write(paths.robustness, robustness_json.content({"target": robustness_json.model(weights)}))


NOW = datetime.now(UTC)


def version(gate: str = "passed", *aliases: str, **fields: Any) -> status.RegistryStatus:
    values: dict[str, Any] = {"settled": True, "experiment_id": "1", "run_id": "r"}
    return status.RegistryStatus(2, aliases, gate, (), **(values | fields))


def approval(state: str, time: datetime = NOW) -> Approval:
    return Approval.model_validate({"state": state, "time": time.isoformat(timespec="seconds")})


@pytest.mark.parametrize(
    ("registered", "decided"),
    [
        (version("failed", "champion", settled=False), True),
        (version("failed"), True),
        (version("failed", settled=False), False),  # the limits or the champion changed
        (version("passed"), False),  # its promotion was interrupted
        (version("passed", on_hold=True), True),
        (version("passed", approval=approval("rejected")), True),
        (version("passed", approval=approval("waiting", NOW + timedelta(hours=1))), True),
        (version("passed", approval=approval("waiting", NOW - timedelta(hours=1))), False),
        (version("passed", approval=approval("expired")), False),
        (version("passed", approval=approval("approved")), False),  # its promotion was interrupted
    ],
)
def test_a_version_is_decided_if_a_run_would_leave_it_as_it_is(
    registered: status.RegistryStatus, decided: bool
) -> None:
    assert registered.decided == decided


def test_a_question_creates_no_database(paths: Paths, tiny_settings: Callable[..., Settings]) -> None:
    settings = tiny_settings()

    assert status.aliases(settings, paths) == {}
    assert status.registry_status(settings, paths) is None
    assert [path.name for path in paths.root.iterdir()] == ["reports"]


def test_the_newest_version_of_these_weights_is_reported(paths: Paths, tiny_settings: Callable[..., Settings]) -> None:
    settings = tiny_settings()
    name = settings.promote.model_name
    connection.configure(settings, paths)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment
    run = client.create_run(experiment.experiment_id)
    client.create_registered_model(name)
    verdict = {"gate": "failed", "gate_reasons": "Too weak.\nToo slow.", "gate_settings": settings.hash("promote")}
    for tags in ({**IDENTITY}, {**IDENTITY, **verdict}, {**IDENTITY, "weights_sha256": "others"}):
        client.create_model_version(name, run.info.artifact_uri, run.info.run_id, tags=tags)
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "2")

    registered = status.registry_status(settings, paths)

    assert status.aliases(settings, paths) == {"champion": 1, "challenger": 2}
    assert registered == status.RegistryStatus(
        version=2,
        aliases=("challenger",),
        gate="failed",
        reasons=("Too weak.", "Too slow."),
        settled=True,
        experiment_id=experiment.experiment_id,
        run_id=run.info.run_id,
    )
    stricter = status.registry_status(tiny_settings(promote={"min_clean_accuracy": 0.5}), paths)
    assert stricter
    assert not stricter.settled
    evaluate(paths, weights="new")
    assert status.registry_status(settings, paths) is None
