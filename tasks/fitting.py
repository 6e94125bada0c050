"""What the two training stages share: the data, the tracked run, the history and the checkpoint."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from d2r_core import checkpoint, files, models, runtime, training
from d2r_core.data import load_split
from d2r_core.evaluation import Attack
from d2r_core.objectives import D2R, Standard
from tasks import lineage, tracking
from tasks.paths import Paths
from tasks.settings import Optimisation, Settings


def fit_and_save(
    settings: Settings,
    paths: Paths,
    *,
    stage: str,
    architecture: Mapping[str, Any],
    objective: Callable[[nn.Module], Standard | D2R],
    criteria: Mapping[str, Attack],
    section: Optimisation,
    epochs: int,
    seed: int,
    weights: Path,
    history: Path,
) -> training.Kept:
    """Build the model of `architecture`, train it in the `objective` made around it, write checkpoint and history.

    Nothing is written before training has ended well.
    """
    manifest = lineage.manifest(paths)
    device = runtime.device(settings.runtime.device)
    train, validation = (
        load_split(paths.prepared / f"{name}.safetensors").to(device) for name in ("train", "validation")
    )
    described = {**architecture, "num_classes": len(manifest["classes"]), "image_size": manifest["image_size"]}
    torch.manual_seed(seed)
    model = models.build(**described).to(device)
    rows: list[dict[str, float]] = []

    with tracking.training_run(settings, paths, stage) as run:

        def log(metrics: Mapping[str, float], epoch: int) -> None:
            rows.append({"epoch": epoch, **metrics})
            print(
                f"{stage} epoch {epoch}/{epochs}: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}", flush=True
            )
            run.log(metrics, epoch)

        kept = training.fit(
            objective(model),
            train,
            validation,
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
            log=log,
            progress=partial(tqdm, disable=None, leave=False, file=sys.stderr),
        )
    model.load_state_dict(kept.state)
    metadata = {
        "architecture": described,
        "classes": manifest["classes"],
        "image_range": [0.0, 1.0],
        "metrics": {"epoch": kept.epoch, **kept.metrics},
        "seed": settings.seed,
        **dataclasses.asdict(lineage.of(settings, paths)),
        "mlflow_run_id": run.id,
    }
    columns = ["epoch", "loss", "learning_rate", *criteria, "images_per_second"]
    files.write_text(history, pd.DataFrame(rows, columns=list(rows[0]) if rows else columns).to_csv(index=False))
    checkpoint.save(weights, model, metadata)
    accuracies = ", ".join(f"{name} {value:.2%}" for name, value in kept.metrics.items())
    print(f"{stage}: kept epoch {kept.epoch} of {epochs} ({accuracies}) in {weights}", flush=True)
    return kept
