"""What the run of a trained model is given once the model is evaluated: figures, files and the servable model."""

import csv
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from d2r_core import checkpoint
from tasks.config.credentials import redact
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import Identity, RobustnessReport
from tasks.registry import integrity, onnx_export, provenance_files, recorded_examples, training_images
from tasks.registry.provenance import PrefectRun
from tasks.tracking import chain_runs, metric_uploader, runs
from tasks.tracking.lineage import Lineage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


class LoggedModel(NamedTuple):
    """MLflow's ids of the run and of the logged model, and the SHA-256 of its manifest."""

    run_id: str
    model_id: str
    manifest_sha256: str


def log_evaluated_model(
    client: "MlflowClient",
    settings: Settings,
    paths: Paths,
    metadata: dict[str, Any],
    robustness: RobustnessReport,
    prefect_run: PrefectRun | None,
) -> LoggedModel:
    """Log the evaluated target model to the run that trained it.

    Where this server does not know that run, a new one is made from the files. The run that trained the guidance gets
    what it missed as well. To repeat all of it does no harm.

    Args:
        metadata: the target checkpoint's JSON.
        prefect_run: the flow run that registers the model, if there is one.

    Raises:
        UserError: the weights are damaged, or their export to ONNX fails. No model is logged then.
    """
    from tasks.registry import bill_of_materials, servable  # which import MLflow or are slow to import

    model, _ = checkpoint.load(paths.target, torch.device("cpu"))  # nothing is logged of damaged weights
    run_id = _training_run(client, settings, paths, metadata)
    complete(client, run_id, paths.train_history)
    if checkpoint.metadata_path(paths.guidance).exists():
        complete(client, str(checkpoint.read_metadata(paths.guidance)["mlflow_run_id"]), paths.pretrain_history)
    chain_runs.end(client, run_id, "FINISHED")
    client.set_tag(run_id, "collapsed", str(metadata["collapsed"]).lower())
    _log_figures(client, run_id, robustness)
    run_folder = str(evaluation_folder(robustness.identity))
    _log_files(client, run_id, paths, run_folder)
    started = datetime.fromtimestamp(client.get_run(run_id).info.start_time / 1000, UTC)
    with tempfile.TemporaryDirectory() as temporary:
        content = Path(temporary) / Path(integrity.CONTENT).name
        content.mkdir()
        for path in (paths.target, checkpoint.metadata_path(paths.target), paths.robustness, paths.examples):
            shutil.copy(path, content)
        training_images.write(paths, content)
        recorded_examples.write(paths, model, content)
        if settings.promote.onnx:
            onnx_export.write(model, list(metadata["classes"]), content)
        provenance = provenance_files.write(paths, content, run_folder, prefect_run)
        bill = bill_of_materials.render(
            settings.promote.model_name, metadata, robustness, provenance, started, paths.root / "requirements.lock"
        )
        (content / bill_of_materials.FILE).write_text(bill, encoding="utf-8")
        client.log_text(run_id, bill, f"{run_folder}/{bill_of_materials.FILE}")
        model_id = servable.log_model(run_id, content, metadata)
    return LoggedModel(run_id, model_id, integrity.log_manifest(model_id))


def evaluation_folder(identity: Identity) -> PurePosixPath:
    """The folder of one evaluation among a run's artifacts: the same weights may be evaluated several times."""
    return PurePosixPath("evaluations", f"{identity.data_hash[:12]}-{identity.evaluation_hash[:12]}")


def complete(client: "MlflowClient", run_id: str, history: Path) -> None:
    """Give the run of a training that ended well what MLflow missed while it was away: points, and its end.

    All points to a new run, none to one that missed nothing; and nothing to a run that this server does not know.

    Args:
        history: the CSV of epochs; beside it as .jsonl, where there is one, the file of all points.
    """
    run = runs.find(client, run_id)
    if run is None:
        return
    uploader = metric_uploader.MetricUploader(client, run_id, _points(history))
    while uploader.send_batch():
        pass
    if run.info.status == "RUNNING":
        client.set_terminated(run_id)


def _points(history: Path) -> Iterator[list["Metric"]]:
    from mlflow.entities import Metric

    points = history.with_suffix(".jsonl")
    if points.exists():
        yield from metric_uploader.Tail(points)
        return
    now = int(time.time() * 1000)
    with history.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            epoch = int(row.pop("epoch"))
            yield [Metric(name, float(value), now, epoch) for name, value in row.items() if value]


def _training_run(client: "MlflowClient", settings: Settings, paths: Paths, metadata: dict[str, Any]) -> str:
    """The run that trained the model; where this server does not know it, one made from the files."""
    import mlflow

    trained_in = str(metadata["mlflow_run_id"])
    if runs.find(client, trained_in) is not None:
        return trained_in
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
        run_id = runs.begin(settings, paths, "train", made_from, restored_from=trained_in)
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()
    return run_id


def _log_figures(client: "MlflowClient", run_id: str, robustness: RobustnessReport) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    accuracies = {
        f"test/{name}/{attack}": figures.accuracy
        for name, model in robustness.models.items()
        for attack, figures in model.attacks.items()
    }
    client.log_batch(run_id, [Metric(key, accuracy, now, 0) for key, accuracy in accuracies.items()])


def _log_files(client: "MlflowClient", run_id: str, paths: Paths, evaluation: str) -> None:
    """What people look at and what the figures were counted from, in a folder of its own; and the histories."""
    reports = (paths.report, paths.model_card, paths.data_page, paths.robustness, paths.examples, paths.validation)
    present = (path for path in (paths.comparison, paths.dvc_lock) if path.exists())
    for path in (*reports, *present):
        client.log_artifact(run_id, str(path), evaluation)
    if paths.params.exists():
        client.log_text(run_id, redact(paths.params.read_text(encoding="utf-8")), f"{evaluation}/{paths.params.name}")
    histories = (paths.pretrain_history, paths.train_history)
    points = (path.with_suffix(".jsonl") for path in histories)
    for path in (*histories, *(path for path in points if path.exists())):
        client.log_artifact(run_id, str(path))
