"""The parent run of one pass of the chain: its pretraining and its training lie below it, whoever starts them.

A pass is data and settings: whatever trains with the same data hash and the same settings hash belongs to it, so that
`dvc repro` stage by stage, a continued training and a retry have the parent of the first stage that trained.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.tracking import connection, errors
from tasks.tracking.lineage import Lineage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

STAGE = "chain"  # the tag `stage` of a parent; its children have that of the stage that trains
PARENT = "mlflow.parentRunId"  # MLflow's own tag of a child


def name(stage: str, manifest: Mapping[str, Any], method: str) -> str:
    """The name of a run, such as "train 2026-11-26 digits d2r": stage, day of its start (UTC), data, training method.

    A user's own images are named after their folder or archive.
    """
    path = manifest["path"]
    data = Path(path).stem if manifest["source"] == "image_folder" and path else manifest["source"]
    return f"{stage} {datetime.now(UTC):%Y-%m-%d} {data} {method}"


def find_or_create(
    client: "MlflowClient", experiment_id: str, lineage: Lineage, run_name: str, tags: Mapping[str, str]
) -> str:
    """The id of the parent of the pass with this lineage; it is marked as running.

    On a server, two machines that begin the same pass in the same moment may make one each; from then on all take the
    older one.

    Args:
        run_name: of a new parent.
        tags: of a new parent, beside those of its lineage.
    """
    identity = {"stage": STAGE, "data_hash": lineage.data_hash, "settings_hash": lineage.settings_hash}
    with connection.exclusive():
        parent = _oldest(client, experiment_id, identity)
        if parent is None:
            parent = client.create_run(experiment_id, tags={**tags, **identity}, run_name=run_name)
    run_id = str(parent.info.run_id)
    client.update_run(run_id, status="RUNNING")
    return run_id


def end(client: "MlflowClient", child_id: str, status: str) -> None:
    """The parent of a run, if it has one that is running, ends as the run did; an absent server costs a warning."""
    try:
        parent_id = client.get_run(child_id).data.tags.get(PARENT)
        if parent_id and client.get_run(parent_id).info.status == "RUNNING":
            client.set_terminated(parent_id, status)
    except Exception as error:  # whatever it is, the training has ended
        _log.warning("MLflow could not end the chain's run as %s: %s", status, errors.root_cause(error))


def is_parent(run: "Run") -> bool:
    """Whether a run is the parent of a pass."""
    return bool(run.data.tags.get("stage") == STAGE)


def _oldest(client: "MlflowClient", experiment_id: str, identity: Mapping[str, str]) -> "Run | None":
    conditions = " and ".join(f"tags.{key} = '{value}'" for key, value in identity.items())
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    matching = client.search_runs([experiment_id], conditions, max_results=1, order_by=order)
    return matching[0] if matching else None
