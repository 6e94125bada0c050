"""What the run of a trained model is given once the model is evaluated: figures, files and the servable model."""

import csv
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from d2r_core import checkpoint, data
from tasks import serving, tracking
from tasks.lineage import Lineage
from tasks.paths import Paths
from tasks.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Recorded(NamedTuple):
    """Where it lies: MLflow's ids of the run and of the logged model."""

    run_id: str
    model_id: str


def record(
    client: "MlflowClient", settings: Settings, paths: Paths, metadata: dict[str, Any], robustness: dict[str, Any]
) -> Recorded:
    """Log the evaluated target model to the run that trained it.

    Where this server does not know that run, a new one is made from the files. All of it may be done again.

    Args:
        metadata: the target checkpoint's JSON.
        robustness: the content of robustness.json.
    """
    model, _ = checkpoint.load(paths.target, torch.device("cpu"))
    images = data.load_split(paths.prepared / "test.safetensors").images[:2]
    run_id = _training_run(client, settings, paths, metadata)
    _log_history(client, run_id, paths.train_history)
    _log_figures(client, run_id, robustness)
    _log_files(client, run_id, paths)
    return Recorded(run_id, serving.log_model(run_id, model, metadata, data.to_float(images).numpy()))


def _training_run(client: "MlflowClient", settings: Settings, paths: Paths, metadata: dict[str, Any]) -> str:
    """The run that trained the model; where this server does not know it, one made from the files."""
    import mlflow
    from mlflow.exceptions import MlflowException

    trained_in = str(metadata["mlflow_run_id"])
    try:
        found = client.get_run(trained_in).info
        if found.lifecycle_stage == "active":
            if found.status == "RUNNING":  # MLflow was away when the training ended, and that it ended well is known
                client.set_terminated(trained_in)
            return trained_in
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    # The artifacts came out of a cache or from another machine, whose server holds the run.
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    assert experiment is not None
    made_before = client.search_runs(
        [experiment.experiment_id], f"status = 'FINISHED' and tags.restored_from = '{trained_in}'"
    )
    if made_before:
        return str(made_before[0].info.run_id)
    made_from = Lineage(**{field.name: metadata[field.name] for field in dataclasses.fields(Lineage)})
    try:
        run_id = tracking.begin(settings, paths, "train", made_from, restored_from=trained_in)
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()
    return run_id


def _log_history(client: "MlflowClient", run_id: str, history: Path) -> None:
    """Log the epochs that the run does not have: all of them to a new run, none to one that missed nothing."""
    from mlflow.entities import Metric

    logged = {metric.step for metric in client.get_metric_history(run_id, "loss")}
    now = int(time.time() * 1000)
    with history.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            step = int(row.pop("epoch"))
            if step not in logged:
                client.log_batch(run_id, [Metric(key, float(value), now, step) for key, value in row.items() if value])


def _log_figures(client: "MlflowClient", run_id: str, robustness: dict[str, Any]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    figures = {
        f"test/{model}/{attack}": figure["accuracy"]
        for model, measured in robustness["models"].items()
        for attack, figure in measured["attacks"].items()
    }
    client.log_batch(run_id, [Metric(key, accuracy, now, 0) for key, accuracy in figures.items()])


def _log_files(client: "MlflowClient", run_id: str, paths: Paths) -> None:
    """What people look at, what the figures stand on, and the checkpoint."""
    reports = (paths.report, paths.model_card, paths.robustness, paths.examples, paths.validation)
    histories = (paths.pretrain_history, paths.train_history)
    recipe = (path for path in (paths.params, paths.dvc_lock) if path.exists())
    for path in (*reports, *histories, *recipe):
        client.log_artifact(run_id, str(path))
    for path in (paths.target, checkpoint.metadata_path(paths.target)):
        client.log_artifact(run_id, str(path), "checkpoint")
