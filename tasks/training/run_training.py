"""What the two training stages share: data, tracked run, resumable state, history and saved weights."""

import csv
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2r_core import checkpoint, distributed, files, models, runtime
from d2r_core.attacks import Clean
from d2r_core.attacks.run import Attack
from d2r_core.data import Split, load_split
from d2r_core.training.checkpointer import Checkpointer
from d2r_core.training.config import Averaging, TrainingConfig, WarmUp, WeightPerturbation
from d2r_core.training.methods import TrainingMethod
from d2r_core.training.trainer import BestCheckpoint, Logger, Trainer
from tasks.config.paths import Paths
from tasks.config.settings import Pretrain, Settings, Train
from tasks.config.stage_code import stage_code
from tasks.data.manifest import read_manifest
from tasks.tracking import runs
from tasks.tracking.environment import current_environment
from tasks.tracking.lineage import current_lineage
from tasks.tracking.source_code import read_source_code
from tasks.training.collapse import CollapseWatch
from tasks.training.metrics_log import MetricsLog


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What one training stage trains, and where it writes the result."""

    stage: str  # "pretrain" or "train"
    section: Pretrain | Train  # the stage's settings
    seed: int
    method: Callable[[nn.Module], TrainingMethod]  # makes the training method around the model that is trained
    validation_attacks: Mapping[str, Attack]
    select_by: str
    weights: Path
    history: Path
    inputs: str = ""  # identifies what else the training starts from, such as the guidance's weights

    def architecture(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """What `models.build` makes for the data of this manifest."""
        return {
            **self.section.architecture.model_dump(),
            "num_classes": len(manifest["classes"]),
            "image_size": manifest["image_size"],
        }


def run_training(settings: Settings, paths: Paths, job: TrainingJob) -> BestCheckpoint:
    """Train the job's model and write weights, metadata and history.

    Before the training has ended well only its state is written, from which the same call continues. Under torchrun
    every process calls it; rank 0 writes.
    """
    manifest = read_manifest(paths)
    code = read_source_code(paths)  # now: the files may change while the training runs
    architecture = job.architecture(manifest)
    state_folder = paths.state / _state_key(settings, job, manifest["hash"])
    device = runtime.device(settings.runtime.device)
    with distributed.process_group(device):
        is_first = distributed.rank() == 0
        splits = load_splits(paths, device)
        log = MetricsLog(job.stage, job.section.epochs, state_folder / "metrics.jsonl", show=is_first)
        watch = CollapseWatch(log, _clean_accuracy(job), images=len(splits[1]), classes=len(manifest["classes"]))
        trainer = make_trainer(settings, job, architecture, splits, device, watch)
        checkpointer = Checkpointer(state_folder, settings.runtime.save_minutes)
        with runs.training_run(settings, paths, job.stage, log.path) if is_first else runs.silent() as run:
            best = trainer.fit(checkpointer, settings.runtime.max_minutes)
        environment = current_environment(paths, device, settings.runtime.precision)
    if is_first:
        metadata = {
            "architecture": architecture,
            "classes": manifest["classes"],
            "image_range": [0.0, 1.0],
            "metrics": {"epoch": best.epoch, **best.metrics},
            "last_metrics": {"epoch": job.section.epochs, **best.last_metrics},
            "collapsed": watch.collapsed(),
            "seed": settings.seed,
            **dataclasses.asdict(current_lineage(settings, paths, code)),
            "git_diff": code.diff,
            "git_diff_redacted": code.diff_redacted,
            "environment": environment.model_dump(),
            "mlflow_run_id": run.id,
        }
        _write_history(job, log)
        model = models.build(**architecture)
        model.load_state_dict(best.state)
        checkpoint.save(job.weights, model, metadata)
        shutil.rmtree(state_folder, ignore_errors=True)
        accuracies = ", ".join(f"{name} {value:.2%}" for name, value in best.metrics.items())
        epochs = job.section.epochs
        print(f"{job.stage}: best epoch {best.epoch} of {epochs} ({accuracies}) saved to {job.weights}", flush=True)
    return best


def make_trainer(
    settings: Settings,
    job: TrainingJob,
    architecture: Mapping[str, Any],
    splits: tuple[Split, Split],
    device: torch.device,
    logger: Logger,
) -> Trainer:
    """The job's model in its method, compiled as the settings say, with all that its training needs."""
    runtime.set_precision(settings.runtime.precision)
    torch.manual_seed(job.seed)
    method = job.method(models.build(**architecture).to(device))
    runtime.compile_models(method, compile=settings.runtime.compile, device=device)
    return Trainer(
        method,
        *splits,
        _training_config(settings, job),
        device=device,
        validation_attacks=job.validation_attacks,
        select_by=job.select_by,
        logger=logger,
    )


def _clean_accuracy(job: TrainingJob) -> str:
    """The name of the accuracy on unperturbed images."""
    return next(name for name, attack in job.validation_attacks.items() if isinstance(attack, Clean))


def load_splits(paths: Paths, device: torch.device) -> tuple[Split, Split]:
    """Training and validation split, on the device if they take less than a quarter of its free memory."""
    train, validation = (load_split(paths.prepared / f"{name}.safetensors") for name in ("train", "validation"))
    if device.type == "cpu" or train.images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return train.to(device), validation.to(device)
    return train, validation


def _training_config(settings: Settings, job: TrainingJob) -> TrainingConfig:
    section = job.section
    config = TrainingConfig(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        crop_padding=section.crop_padding,
        flip=section.flip,
        seed=job.seed,
        precision=settings.runtime.precision,
    )
    if isinstance(section, Pretrain):
        return config
    return dataclasses.replace(
        config,
        gradient_clip=section.gradient_clip,
        weight_perturbation=WeightPerturbation(**section.weight_perturbation.model_dump()),
        averaging=Averaging(**section.average.model_dump()),
        warm_up=WarmUp(**section.warm_up.model_dump()),
    )


def _state_key(settings: Settings, job: TrainingJob, data_hash: str) -> str:
    """Identifies everything that a training depends on: a state of other settings, data or code is never resumed."""
    code = files.code_fingerprint(*stage_code(job.stage))
    section = job.section.model_dump(mode="json")
    parts = [section, job.seed, data_hash, job.inputs, settings.runtime.precision, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write_history(job: TrainingJob, log: MetricsLog) -> None:
    """The epochs as a CSV, and beside it the file of all points."""
    rows = log.epochs()
    without_epochs = ["epoch", "loss", "learning_rate", *job.validation_attacks, "images_per_second"]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else without_epochs, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(job.history, table.getvalue())
    points = log.path.read_text(encoding="utf-8") if log.path.exists() else ""
    files.write_text(job.history.with_suffix(".jsonl"), points)
