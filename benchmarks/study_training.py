"""The study's trainings and evaluations, by the code of the stages; each continues where it was stopped.

A training's folder is named after its settings, so that two cells with the same settings share it. It is a project's
folder as the stages know it: `data/prepared`, `models`, `reports`, `state`; and `result.json`, `gradients.jsonl`.
"""

import csv
import fcntl
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from study_cells import CELLS, PUBLISHED, SEARCH, Study
from torch import Tensor, nn

from d2r_core import checkpoint, files
from d2r_core.data import load_split
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted
from tasks import prepare, pretrain, train
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.evaluate_model import evaluate_model
from tasks.tracking.uri import tracking_uri
from tasks.training.run_training import load_splits, make_trainer

_GRADIENT_STEPS = 200
_FAILED = -1.0  # the score of a training whose loss was not finite


class BusyError(Exception):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of the folder; raises BusyError if one is in it and `wait` is false."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(folder.name) from None
        yield


@contextmanager
def interrupted_at(end: float) -> Iterator[None]:
    """Raise Interrupted inside the block once `time.monotonic()` has reached `end`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("the time is over; finished batches are cached: run it again to continue.")

    before = signal.signal(signal.SIGALRM, stop)
    if end < float("inf"):
        signal.setitimer(signal.ITIMER_REAL, max(0.001, end - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_folder(study: Study, settings: Settings) -> Path:
    """Where the training with these settings lies."""
    return study.folder / "runs" / settings.hash("seed", "prepare", "pretrain", "train", "evaluate")[:12]


def train_model(study: Study, settings: Settings, end: float) -> Paths:
    """Train with these settings, or with what is left of it, and return the folder.

    Afterwards it holds the target's weights, or `failed.json` if the loss was not finite. Raises Interrupted at `end`.
    """
    paths = Paths(run_folder(study, settings))
    failed = paths.root / "failed.json"
    if paths.target.exists() or failed.exists():
        return paths
    _link_data(study, settings, paths)
    if not paths.guidance.exists():
        source = _guidance(study, settings, end)
        paths.guidance.parent.mkdir(parents=True, exist_ok=True)
        for file in (checkpoint.metadata_path(source.guidance), source.guidance):  # the weights last
            with files.atomic(paths.guidance.with_suffix(file.suffix)) as temporary:
                shutil.copy(file, temporary)
        files.write_text(paths.pretrain_history, source.pretrain_history.read_text(encoding="utf-8"))
    try:
        train.run(_limited(settings, end), paths)
    except UserError as error:
        if "not finite" not in str(error):
            raise
        files.write_text(failed, json.dumps({"failed": str(error)}) + "\n")
    return paths


def _guidance(study: Study, settings: Settings, end: float) -> Paths:
    """The guidance model of these settings, which several cells share."""
    key = settings.hash("seed", "prepare", "pretrain")[:12]
    paths = Paths(study.folder / "guidance" / key)
    with locked(paths.root, wait=True):
        if not (paths.guidance.exists() and paths.pretrain_history.exists()):
            _link_data(study, settings, paths)
            pretrain.run(_limited(settings, end), paths)
    return paths


def _link_data(study: Study, settings: Settings, paths: Paths) -> None:
    """Prepare the images, the same for every seed, unless they are there; and link the folder to them."""
    prepared = Paths(study.folder / "data" / settings.hash("prepare")[:12])
    with locked(prepared.root, wait=True):
        if not prepared.manifest.exists():
            prepare.run(settings.model_copy(update={"seed": 0}), prepared)
    if not paths.prepared.exists():
        paths.prepared.parent.mkdir(parents=True, exist_ok=True)
        paths.prepared.symlink_to(prepared.prepared.resolve(), target_is_directory=True)


def _limited(settings: Settings, end: float) -> Settings:
    """The settings with what is left of the time."""
    if end == float("inf"):
        return settings
    minutes = max(0.001, (end - time.monotonic()) / 60)
    return settings.model_copy(update={"runtime": settings.runtime.model_copy(update={"max_minutes": minutes})})


def search(study: Study, key: str, end: float) -> dict[str, Any]:
    """The learning rate, schedule and weight decay that do best for this cell on the validation split.

    One key after the other, on fewer images. Standard training is judged by its clean accuracy, the others under
    PGD-10. Raises Interrupted at `end`.
    """
    choice = {name: values[0] for name, values in SEARCH.items()}
    judged_by = "clean_accuracy" if CELLS[key].changes["train.method"]["name"] == "standard" else "robust_accuracy"

    def score(value: Any, name: str) -> float:
        settings = study.settings(key, search=True, **{**choice, name: value})
        with locked(run_folder(study, settings), wait=True):
            paths = train_model(study, settings, end)
        if not paths.target.exists():
            return _FAILED
        return float(checkpoint.read_metadata(paths.target)["metrics"][judged_by])

    for name, values in SEARCH.items():
        choice[name] = max(values, key=partial(score, name=name))
    return choice


def choice_of(study: Study, key: str, end: float) -> dict[str, Any]:
    """The searched settings of a cell: its own, those of a related cell, or the published ones."""
    return search(study, CELLS[key].search, end) if CELLS[key].search else dict(PUBLISHED)


def measure(study: Study, key: str, seed: int, end: float) -> dict[str, Any]:
    """Train and evaluate a cell, or do what is left of it; returns what `result.json` holds.

    Raises:
        Interrupted: at `end`.
        BusyError: another process works at it.
    """
    settings = study.settings(key, seed, **choice_of(study, key, end))
    choice = {name: getattr(settings.train, name) for name in SEARCH}  # the cell's own change of one goes before
    folder = run_folder(study, settings)
    with locked(folder, wait=False):
        result_file = folder / "result.json"
        if not result_file.exists():
            paths = train_model(study, settings, end)
            with interrupted_at(end):
                result = _result(settings, paths)
            files.write_text(result_file, json.dumps({**result, "choice": choice}, indent=1) + "\n")
        if CELLS[key].gradients and seed == 0 and not (folder / "gradients.jsonl").exists():
            with interrupted_at(end):
                record_gradients(settings, Paths(folder))
        result = json.loads(result_file.read_text(encoding="utf-8"))
    return dict(result)


def _result(settings: Settings, paths: Paths) -> dict[str, Any]:
    failed = paths.root / "failed.json"
    if failed.exists():
        return dict(json.loads(failed.read_text(encoding="utf-8")))
    model, metadata = checkpoint.load(paths.target, torch.device("cpu"))
    test = load_split(paths.prepared / "test.safetensors")
    figures = evaluate_model(
        model,
        test,
        settings.evaluate,
        classes=len(metadata["classes"]),
        seed=0,
        description=paths.root.name,
        cache_folder=paths.root / "attacked",
    ).figures
    _log_to_run(settings, metadata["mlflow_run_id"], {name: row["accuracy"] for name, row in figures.items()})
    shutil.rmtree(paths.root / "attacked", ignore_errors=True)
    images = read_manifest(paths)["splits"]["train"]["images"]
    return {
        "commit": metadata["git_commit"],
        "mlflow_run_id": metadata["mlflow_run_id"],
        "collapsed": metadata["collapsed"],
        "best": metadata["metrics"],
        "last": metadata["last_metrics"],
        "accuracies": figures,
        "train_seconds": _seconds(paths.train_history, images),
        "pretrain_seconds": _seconds(paths.pretrain_history, images),
    }


def _seconds(history: Path, images: int) -> float:
    """The seconds that the epochs' steps took, without validation and pauses."""
    rows = list(csv.DictReader(history.read_text(encoding="utf-8").splitlines()))
    return sum(images / float(row["images_per_second"]) for row in rows)


def _log_to_run(settings: Settings, run_id: str, accuracies: dict[str, float]) -> None:
    """Add the test accuracies to the training's run, as a registered model has them."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(settings))
    for name, accuracy in accuracies.items():
        client.log_metric(run_id, f"test/target/{name}", accuracy)


def record_gradients(settings: Settings, paths: Paths) -> None:
    """Write `gradients.jsonl`: each loss term of the first 200 steps, and its gradient's norm in either model.

    The training of the same settings begun anew, with the same draws. Killed, it starts anew.
    """
    job = train.training_job(settings, paths)
    device = torch.device("cpu")
    trainer = make_trainer(
        settings, job, job.architecture(read_manifest(paths)), load_splits(paths, device), device, _Silent()
    )
    rows: list[dict[str, Any]] = []

    def record(method: nn.Module, inputs: tuple[Any, ...], terms: dict[str, Tensor]) -> None:
        rows.append({"step": len(rows) + 1, **term_gradients(method, terms)})

    def enough() -> str | None:
        return f"{_GRADIENT_STEPS} steps are recorded" if len(rows) >= _GRADIENT_STEPS else None

    trainer.method.register_forward_hook(record)
    try:
        while trainer.epoch < settings.train.epochs:
            trainer.epoch, trainer.step = trainer.epoch + 1, 0
            trainer.train_epoch(enough)
    except UserError as error:
        rows.append({"step": len(rows), "failed": str(error)})
    except Interrupted:
        if not enough():
            raise
    files.write_text(paths.root / "gradients.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


class _Silent:
    """A logger of nothing."""

    def log_epoch(self, metrics: Any, epoch: int) -> None: ...

    def log_step(self, means: Any, epoch: int, step: int, steps: int) -> None: ...


def term_gradients(method: nn.Module, terms: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Each term's value, and the norm of its gradient in the target and in the guidance."""
    models = {name: list(module.parameters()) for name, module in method.named_children()}
    named = {name: term for name, term in terms.items() if term.requires_grad and name != "total"}
    rows = {}
    for name, term in named.items():
        row = {"value": float(term.detach())}
        for model, parameters in models.items():
            learning = [parameter for parameter in parameters if parameter.requires_grad]
            if learning:
                gradients = torch.autograd.grad(term, learning, retain_graph=True, materialize_grads=True)
                row[model] = float(nn.utils.get_total_norm(gradients))
        rows[name] = row
    return rows
