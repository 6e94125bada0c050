"""A problem that small networks learn in seconds, and the training of it; shared by the engine's tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2r_core import models, runtime
from d2r_core.attacks import PGD, Clean, fgsm
from d2r_core.data import Split
from d2r_core.training import trainer
from d2r_core.training.methods import D2R, Attack, Objective

CPU = torch.device("cpu")
ATTACK: Attack = {"eps": 0.1, "step_size": 0.025, "steps": 5}


def split(seed: int, count: int = 128) -> Split:
    """Two classes of 8 x 8 images: their left half is dark or bright by more than the attack's eps, and a checkerboard
    fainter than eps runs one way or the other. Standard training leans on both, robust training on the half alone."""
    labels = torch.arange(count) % 2
    sign = torch.where(labels == 1, 1, -1)[:, None, None, None]
    images = 128 + torch.randint(-10, 11, (count, 3, 8, 8), generator=runtime.generator(seed, CPU))
    images[:, :, :, :4] += 35 * sign
    images += 15 * sign * ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1)
    return Split(images.to(torch.uint8), labels)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("wide_resnet", num_classes=2, image_size=8, depth=10, widen_factor=1)


def d2r(seed: int = 0, **changes: Any) -> D2R:
    return D2R(network(seed), network(seed + 100), attack=ATTACK, clean_weight=20.0, adv_weight=30.0, **changes)


def fit(
    objective: Objective, train: Split | None = None, validation: Split | None = None, **changes: Any
) -> tuple[trainer.Kept, list[Mapping[str, float]]]:
    """Train on the toy or on other splits; returns what was kept and what was logged for each epoch."""
    logged: list[Mapping[str, float]] = []
    arguments: dict[str, Any] = {
        "device": CPU,
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 0.02,
        "schedule": "constant",
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "crop_padding": 1,
        "flip": False,
        "seed": 0,
        "criteria": {"clean_accuracy": Clean(), "robust_accuracy": PGD(**ATTACK)},
        "log": lambda metrics, epoch: logged.append({"epoch": epoch, **metrics}),
    }
    return trainer.fit(objective, train or split(0), validation or split(1, 64), **{**arguments, **changes}), logged


def train_to_file(state_folder: Path, result: Path) -> None:
    """What the killed processes of the tests run: train, saving at every step, and write the weights."""
    torch.set_num_threads(1)
    objective = D2R(network(0), network(100), attack={**ATTACK, "steps": 1}, clean_weight=20.0, adv_weight=30.0)
    criteria = {"robust_accuracy": fgsm(0.1)}
    kept, _ = fit(objective, state_folder=state_folder, save_minutes=0.0, average="ema", epochs=2, criteria=criteria)
    torch.save(kept.state, result)
