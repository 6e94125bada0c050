"""A problem that small networks learn in seconds, and the training of it; shared by the engine's tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2r_core import models, runtime
from d2r_core.attacks import PGD, Clean, fgsm
from d2r_core.attacks.run import Attack
from d2r_core.data import Split
from d2r_core.training.checkpointer import Checkpointer
from d2r_core.training.config import Averaging, TrainingConfig
from d2r_core.training.methods import D2R, AttackParameters, TrainingMethod
from d2r_core.training.trainer import BestCheckpoint, Trainer

CPU = torch.device("cpu")
ATTACK: AttackParameters = {"eps": 0.1, "step_size": 0.025, "steps": 5}
VALIDATION_ATTACKS: Mapping[str, Attack] = {
    "clean_accuracy": Clean(),
    "robust_accuracy": PGD(**ATTACK),
}
CONFIG: Mapping[str, Any] = {
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 0.02,
    "schedule": "constant",
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "crop_padding": 1,
    "flip": False,
    "seed": 0,
}


class EpochList:
    """A logger that collects a row per epoch."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def log_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.rows.append({"epoch": epoch, **metrics})

    def log_step(self, means: Mapping[str, float], epoch: int, step: int, steps: int) -> None:
        pass


def split(seed: int, count: int = 128) -> Split:
    """Two classes of 8 x 8 images: their left half is dark or bright by more than the attack's eps, and a checkerboard
    fainter than eps runs one way or the other. Standard training uses both, robust training the half alone."""
    labels = torch.arange(count) % 2
    sign = torch.where(labels == 1, 1, -1)[:, None, None, None]
    images = 128 + torch.randint(-10, 11, (count, 3, 8, 8), generator=runtime.generator(seed, CPU))
    images[:, :, :, :4] += 35 * sign
    images += 15 * sign * ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1)
    return Split(images.to(torch.uint8), labels)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("wide_resnet", num_classes=2, image_size=8, depth=10, widen_factor=1)


def d2r(seed: int = 0) -> D2R:
    return D2R(network(seed), network(seed + 100), attack=ATTACK, clean_weight=20.0, adv_weight=30.0)


def trainer(
    method: TrainingMethod,
    train: Split | None = None,
    validation: Split | None = None,
    *,
    device: torch.device = CPU,
    validation_attacks: Mapping[str, Attack] = VALIDATION_ATTACKS,
    logger: EpochList | None = None,
    **config: Any,
) -> Trainer:
    """A trainer on the toy or on other splits, with CONFIG changed by `config`."""
    return Trainer(
        method,
        train or split(0),
        validation or split(1, 64),
        TrainingConfig(**{**CONFIG, **config}),
        device=device,
        validation_attacks=validation_attacks,
        select_by=list(validation_attacks)[-1],
        logger=logger,
    )


def fit(
    method: TrainingMethod,
    *splits: Split,
    state_folder: Path | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
    **options: Any,
) -> tuple[BestCheckpoint, list[Mapping[str, float]]]:
    """Train with `trainer(method, *splits, **options)`; returns the best checkpoint and the log of each epoch."""
    logger = EpochList()
    checkpointer = Checkpointer(state_folder, save_minutes) if state_folder else None
    best = trainer(method, *splits, logger=logger, **options).fit(checkpointer, max_minutes)
    return best, logger.rows


def train_to_file(state_folder: Path, result: Path) -> None:
    """What the killed processes of the tests run: train, saving at every step, and write the weights."""
    torch.set_num_threads(1)
    method = D2R(network(0), network(100), attack={**ATTACK, "steps": 1}, clean_weight=20.0, adv_weight=30.0)
    best, _ = fit(
        method,
        state_folder=state_folder,
        save_minutes=0.0,
        averaging=Averaging(name="ema"),
        epochs=2,
        validation_attacks={"robust_accuracy": fgsm(0.1)},
    )
    torch.save(best.state, result)
