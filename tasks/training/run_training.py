"""What the two training stages share: the data, the tracked run, the state, the history and the checkpoint."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from d2r_core import checkpoint, distributed, files, models, runtime
from d2r_core.attacks.run import Attack
from d2r_core.data import load_split
from d2r_core.training import trainer
from d2r_core.training.methods import Objective
from tasks.config.paths import Paths
from tasks.config.settings import Optimisation, Settings, Train
from tasks.config.stage_code import stage_code
from tasks.data.manifest import read_manifest
from tasks.tracking import runs
from tasks.tracking.lineage import current_lineage
from tasks.training.metrics_log import Progress


def fit_and_save(
    settings: Settings,
    paths: Paths,
    *,
    stage: str,
    architecture: Mapping[str, Any],
    objective: Callable[[nn.Module], Objective],
    criteria: Mapping[str, Attack],
    section: Optimisation,
    epochs: int,
    seed: int,
    weights: Path,
    history: Path,
    inputs: str = "",
) -> trainer.Kept:
    """Build the model of `architecture`, train it in the `objective` made around it, write checkpoint and history.

    Nothing is written before training has ended well but its state, from which the same call continues. Under
    torchrun every process calls it; the first one writes.

    Args:
        inputs: names what else the training starts from, such as the guidance's weights.
    """
    manifest = read_manifest(paths)
    device = runtime.device(settings.runtime.device)
    described = {**architecture, "num_classes": len(manifest["classes"]), "image_size": manifest["image_size"]}
    state_folder = paths.state / _key(settings, stage, section, seed, manifest["hash"], inputs)
    options = _options(section) if isinstance(section, Train) else {}
    runtime.set_precision(settings.runtime.precision)
    with distributed.process_group(device):
        train, validation = (load_split(paths.prepared / f"{name}.safetensors") for name in ("train", "validation"))
        if device.type == "cpu" or train.images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            train, validation = train.to(device), validation.to(device)
        torch.manual_seed(seed)
        trained = objective(models.build(**described).to(device))
        runtime.compile_models(trained, compile=settings.runtime.compile, device=device)
        first = distributed.rank() == 0
        progress = Progress(stage, epochs, state_folder / "metrics.jsonl", show=first)
        with runs.training_run(settings, paths, stage, progress.path) if first else runs.silent() as run:
            kept = trainer.fit(
                trained,
                train,
                validation,
                device=device,
                epochs=epochs,
                batch_size=section.batch_size,
                learning_rate=section.learning_rate,
                schedule=section.schedule,
                momentum=section.momentum,
                weight_decay=section.weight_decay,
                crop_padding=section.crop_padding,
                flip=section.flip,
                seed=seed,
                criteria=criteria,
                log=progress.log,
                log_step=progress.log_step,
                precision=settings.runtime.precision,
                state_folder=state_folder,
                save_minutes=settings.runtime.save_minutes,
                max_minutes=settings.runtime.max_minutes,
                **options,
            )
    if not first:
        return kept
    model = models.build(**described)
    model.load_state_dict(kept.state)
    metadata = {
        "architecture": described,
        "classes": manifest["classes"],
        "image_range": [0.0, 1.0],
        "metrics": {"epoch": kept.epoch, **kept.metrics},
        "last_metrics": {"epoch": epochs, **kept.last_metrics},
        "seed": settings.seed,
        **dataclasses.asdict(current_lineage(settings, paths)),
        "mlflow_run_id": run.id,
    }
    rows = progress.epochs()
    columns = ["epoch", "loss", "learning_rate", *criteria, "images_per_second"]
    files.write_text(history, pd.DataFrame(rows, columns=list(rows[0]) if rows else columns).to_csv(index=False))
    points = progress.path.read_text(encoding="utf-8") if progress.path.exists() else ""
    files.write_text(history.with_suffix(".jsonl"), points)
    checkpoint.save(weights, model, metadata)
    shutil.rmtree(state_folder, ignore_errors=True)
    accuracies = ", ".join(f"{name} {value:.2%}" for name, value in kept.metrics.items())
    print(f"{stage}: kept epoch {kept.epoch} of {epochs} ({accuracies}) in {weights}", flush=True)
    return kept


def _options(section: Train) -> dict[str, Any]:
    """The target's quality options as training.fit takes them."""
    return {
        "gradient_clip": section.gradient_clip,
        "awp_gamma": section.weight_perturbation.gamma,
        "awp_from_epoch": section.weight_perturbation.from_epoch,
        "average": section.average.name,
        "average_decay": section.average.decay,
        "average_from_epoch": section.average.from_epoch,
    }


def _key(settings: Settings, stage: str, section: Optimisation, seed: int, data_hash: str, inputs: str) -> str:
    """Names everything that a training depends on: a state of other settings, data or code is never continued."""
    code = files.code_fingerprint(*stage_code(stage))
    parts = [section.model_dump(mode="json"), seed, data_hash, inputs, settings.runtime.precision, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
