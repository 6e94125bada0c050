"""One recipe, trained and evaluated with d2r_core and the authors' AutoAttack alone; it resumes where it stopped.

Its folder holds `training/` and `attacked/` (the state), `epochs.jsonl`, `target.safetensors` and `robust.json`.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2r_core import checkpoint, files, models, runtime
from d2r_core.attacks import PGD, Clean, cw
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import Noise
from d2r_core.attacks.run import Attack, cascade, run_attack
from d2r_core.data import Split
from d2r_core.evaluation.statistics import wilson
from d2r_core.interruption import Interrupted
from d2r_core.training.checkpointer import Checkpointer
from d2r_core.training.config import TrainingConfig
from d2r_core.training.methods import D2R, Trades, TrainingMethod
from d2r_core.training.trainer import Trainer

StopReason = Callable[[], str | None]  # why to stop now, or None


def _published() -> TrainingConfig:
    return TrainingConfig(
        epochs=100,
        batch_size=128,
        learning_rate=0.1,
        schedule="step",
        momentum=0.9,
        weight_decay=2e-4,
        crop_padding=4,
        flip=True,
        seed=1,
        precision="bf16",
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run and what evaluates it; as published (arXiv 2506.07056) where nothing else is said."""

    method: str = "d2r"
    target: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "preact_resnet18"})
    guidance: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "resnet18"})
    steps: int = 10
    attack_steps: int = 20  # of PGD and CW, in the evaluation
    autoattack: Literal["quick", "standard"] | None = "standard"
    attack_batch: int = 250
    training: TrainingConfig = dataclasses.field(default_factory=_published)

    def with_training(self, **changes: Any) -> "Recipe":
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **changes))


def in_miniature(recipe: Recipe) -> Recipe:
    """The same recipe with a tiny network, three epochs and weak attacks."""
    tiny = {"name": "wide_resnet", "depth": 10, "widen_factor": 1}
    perturbation = dataclasses.replace(recipe.training.weight_perturbation, from_epoch=2)
    changes: dict[str, Any] = {"epochs": 3, "batch_size": 32, "crop_padding": 1, "precision": "fp32"}
    autoattack: Literal["quick"] | None = "quick" if recipe.autoattack else None
    small = dataclasses.replace(
        recipe, target=tiny, guidance=tiny, steps=2, attack_steps=2, autoattack=autoattack, attack_batch=8
    )
    return small.with_training(weight_perturbation=perturbation, **changes)


@dataclass(frozen=True)
class EpochLog:
    """Appends each epoch's figures to `epochs.jsonl`; an epoch that is repeated replaces its line."""

    folder: Path
    compiled: bool
    clock: list[float] = dataclasses.field(default_factory=lambda: [time.monotonic()])  # when the epoch began

    def log_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        seconds = time.monotonic() - self.clock[0]
        self.clock[0] = time.monotonic()
        lines = [line for line in read_epochs(self.folder) if line["epoch"] < epoch]
        lines.append({"epoch": epoch, **metrics, "seconds": seconds, "compiled": self.compiled})
        files.write_text(self.folder / "epochs.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)

    def log_step(self, means: Mapping[str, float], epoch: int, step: int, steps: int) -> None:
        """Not of interest here."""


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "epochs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def train(
    recipe: Recipe, data: Mapping[str, Split], folder: Path, device: torch.device, max_minutes: float | None
) -> None:
    """Train until `target.safetensors` lies in `folder`. Raises Interrupted with the state saved."""
    if (folder / "target.safetensors").exists():
        return
    shape: dict[str, Any] = {
        "num_classes": int(data["train"].labels.max()) + 1,
        "image_size": data["train"].images.shape[-1],
    }
    config = recipe.training
    runtime.set_precision(config.precision)
    torch.manual_seed(config.seed - 1)
    guidance = models.build(**recipe.guidance, **shape).to(device)
    torch.manual_seed(config.seed)
    target = models.build(**recipe.target, **shape).to(device)
    attack: Any = {"eps": 0.031, "step_size": 0.007, "steps": recipe.steps}
    method: TrainingMethod = (
        Trades(target, attack=attack, beta=6.0)
        if recipe.method == "trades"
        else D2R(target, guidance, attack=attack, clean_weight=20.0, adv_weight=30.0)
    )
    runtime.compile_models(method, compile="auto", device=device)
    folder.mkdir(parents=True, exist_ok=True)
    best = Trainer(
        method,
        data["train"].to(device),
        data["validation"].to(device),
        config,
        device=device,
        validation_attacks={"clean_accuracy": Clean(), "robust_accuracy": PGD(eps=0.031, step_size=0.007, steps=10)},
        select_by="robust_accuracy",
        logger=EpochLog(folder, runtime.is_compiled(method.model)),
    ).fit(Checkpointer(folder / "training", save_minutes=2.0), max_minutes)
    model = models.build(**recipe.target, **shape)
    model.load_state_dict(best.state)
    checkpoint.save(
        folder / "target.safetensors", model, {"architecture": {**recipe.target, **shape}, "epoch": best.epoch}
    )
    shutil.rmtree(folder / "training")


@dataclass(frozen=True)
class Stoppable:
    """An attack that ends between two batches."""

    attack: Attack
    stop_reason: StopReason

    @property
    def name(self) -> str:
        return self.attack.name

    @property
    def passes(self) -> int:
        return self.attack.passes

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        if reason := self.stop_reason():
            raise Interrupted(f"{reason}; the batches attacked so far are cached: run it again to continue.")
        return self.attack(model, x, y, noise)


def evaluate(recipe: Recipe, test: Split, folder: Path, device: torch.device, stop_reason: StopReason) -> None:
    """Attack the trained weights in fp32 and write `robust.json`: attack -> robust images. Raises Interrupted."""
    runtime.set_precision("fp32")
    model, metadata = checkpoint.load(folder / "target.safetensors", device)
    robust: dict[str, int] = read_robust(folder)
    config = EvaluationConfig(
        batch_size=recipe.attack_batch,
        seed=0,
        device=device,
        cache_folder=folder / "attacked",
        steps=recipe.attack_steps,  # of the field's radius, 8/255; training has the published 0.031
    )
    margin_attack = cw(eps=config.eps, step_size=config.step_size, steps=config.steps)
    for attack in (Clean(), config.pgd, margin_attack):
        if attack.name not in robust:
            result = run_attack(model, test, Stoppable(attack, stop_reason), config.cached_in(attack.name))
            robust[attack.name] = int(result.correct(test.labels.cpu()).sum())
            files.write_text(folder / "robust.json", json.dumps(robust) + "\n")
    if recipe.autoattack:
        from tasks.evaluation import autoattack

        classes = metadata["architecture"]["num_classes"]
        attacks = autoattack.attacks(recipe.autoattack, eps=config.eps, norm="Linf", seed=0, classes=classes)
        stoppable = [Stoppable(attack, stop_reason) for attack in attacks]
        _, robust_after = cascade(model, test, stoppable, config.cached_in("autoattack"))
        robust |= robust_after
        files.write_text(folder / "robust.json", json.dumps(robust) + "\n")
    shutil.rmtree(folder / "attacked", ignore_errors=True)


def read_robust(folder: Path) -> dict[str, int]:
    path = folder / "robust.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def figures(recipe: Recipe, folder: Path, images: int) -> str:
    """The training's curve and the accuracies so far, as Markdown; "" before the first epoch's end."""
    epochs = read_epochs(folder)
    if not epochs:
        return ""
    config, seconds = recipe.training, sorted(line["seconds"] for line in epochs)
    best = max(epochs, key=lambda line: (line["robust_accuracy"], line["epoch"]))
    text = (
        f"{len(epochs)} of {config.epochs} epochs, batch {config.batch_size}, {recipe.steps} attack steps, seed "
        f"{config.seed}, {config.precision}, {'compiled' if epochs[-1]['compiled'] else 'eager'}; median "
        f"{seconds[len(seconds) // 2]:.1f} s per epoch, {sum(seconds) / 60:.1f} min in all. On the validation split, "
        f"epoch {best['epoch']} is the best: {best['clean_accuracy']:.2%} clean, {best['robust_accuracy']:.2%} under "
        f"PGD-10; the last one has {epochs[-1]['clean_accuracy']:.2%} and {epochs[-1]['robust_accuracy']:.2%}.\n"
    )
    if robust := read_robust(folder):
        text += "\n| attack, Linf 8/255, fp32 | robust | accuracy | 95 % interval |\n|---|---|---|---|\n"
    for name, count in robust.items():
        low, high = wilson(count, images)
        text += f"| {name} | {count} of {images} | {count / images:.2%} | {low:.2%} to {high:.2%} |\n"
    return text
