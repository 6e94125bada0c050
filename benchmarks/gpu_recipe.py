"""One recipe trained and evaluated with d2r_core alone, in pieces that continue where the last one stopped.

Its folder holds `training/` and `attacked/`, large and of use on this machine only, and what is small enough to
be taken elsewhere: `epochs.jsonl`, the finished weights, and `evaluation.json`.
"""

import dataclasses
import hashlib
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
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.run import Attack
from d2r_core.data import Split, content_hash
from d2r_core.interruption import Interrupted
from d2r_core.training import trainer, weight_average
from d2r_core.training.methods import D2R, Objective, Trades

Stop = Callable[[], str | None]  # why to stop now, or None

_SAVE_MINUTES = 2.0
_VALIDATION_STEPS = 10  # of the PGD attack that chooses the checkpoint


@dataclass(frozen=True)
class Recipe:
    """A training, as published (arXiv 2506.07056) where nothing else is said, and what is evaluated after it."""

    method: Literal["d2r", "trades"] = "d2r"
    target: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "preact_resnet18"})
    guidance: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "resnet18"})
    epochs: int = 100
    batch_size: int = 128
    crop_padding: int = 4
    flip: bool = True
    steps: int = 10
    awp_gamma: float = 0.0
    awp_from_epoch: int = 11
    average: weight_average.Averaging = "none"
    seed: int = 0
    attack_steps: int = 20  # of PGD and CW, in the evaluation
    autoattack: Literal["quick", "standard"] = "standard"
    batch_size_attacked: int = 250
    shard: int = 1000  # test images whose finished outcome is written down at once


EPS, STEP_SIZE = 8 / 255, 2 / 255  # of the evaluation; training has the published 0.031 and 0.007


def folder(state: Path, name: str, recipe: Recipe, data: Mapping[str, Split]) -> Path:
    """Where the recipe's state lies, named after all that it depends on: another one is never continued."""
    code = files.code_fingerprint("d2r_core", "benchmarks/gpu_recipe.py", "tasks/evaluation/autoattack.py")
    parts = [dataclasses.asdict(recipe), content_hash(data), code]
    return state / f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def train(
    recipe: Recipe, data: Mapping[str, Split], where: Path, device: torch.device, max_minutes: float | None
) -> None:
    """Train until the weights lie in `where`. Raises Interrupted, with the state saved there."""
    if weights(where).exists():
        return
    shape: dict[str, Any] = {
        "num_classes": int(data["train"].labels.max()) + 1,
        "image_size": data["train"].images.shape[-1],
    }
    precision = _precision(device)
    runtime.set_precision(precision)
    torch.manual_seed(recipe.seed)
    guidance = models.build(**recipe.guidance, **shape).to(device)
    torch.manual_seed(recipe.seed + 1)
    objective = _objective(recipe, models.build(**recipe.target, **shape).to(device), guidance)
    runtime.compile_models(objective, compile="auto", device=device)
    begun = time.monotonic()

    def log(metrics: Mapping[str, float], epoch: int) -> None:
        nonlocal begun
        how = {"precision": precision, "compiled": runtime.is_compiled(objective.model)}
        line = {"epoch": epoch, **metrics, "seconds": time.monotonic() - begun, **how}
        begun = time.monotonic()
        lines = [earlier for earlier in epochs(where) if earlier["epoch"] != epoch] + [line]
        files.write_text(where / "epochs.jsonl", "".join(f"{json.dumps(one)}\n" for one in lines))
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), f"(epoch {epoch})", flush=True)

    where.mkdir(parents=True, exist_ok=True)
    kept = trainer.fit(
        objective,
        data["train"].to(device),
        data["validation"].to(device),
        device=device,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=0.1,
        schedule="step",
        momentum=0.9,
        weight_decay=2e-4,
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        seed=recipe.seed + 1,
        criteria={
            "clean_accuracy": evaluation.clean(),
            "robust_accuracy": evaluation.pgd(0.031, 0.007, _VALIDATION_STEPS),
        },
        log=log,
        awp_gamma=recipe.awp_gamma,
        awp_from_epoch=recipe.awp_from_epoch,
        average=recipe.average,
        precision=precision,
        state_folder=where / "training",
        save_minutes=_SAVE_MINUTES,
        max_minutes=max_minutes,
    )
    model = models.build(**recipe.target, **shape)
    model.load_state_dict(kept.state)
    described = {"architecture": {**recipe.target, **shape}, "epoch": kept.epoch, "metrics": kept.metrics}
    checkpoint.save(weights(where), model, described | {"last_metrics": kept.last_metrics, "precision": precision})
    shutil.rmtree(where / "training")


def evaluate(recipe: Recipe, test: Split, where: Path, device: torch.device, stop: Stop) -> None:
    """Attack the finished weights in fp32, shard by shard of the test images, until all figures are written down.

    Raises:
        Interrupted: between two batches; those that are done are kept in `where`.
    """
    from tasks.evaluation import autoattack

    runtime.set_precision("fp32")
    model, described = checkpoint.load(weights(where), device)
    classes = described["architecture"]["num_classes"]
    single = {
        "clean": evaluation.clean(),
        f"PGD-{recipe.attack_steps}": evaluation.pgd(EPS, STEP_SIZE, recipe.attack_steps),
        f"CW-{recipe.attack_steps}": evaluation.cw(EPS, STEP_SIZE, recipe.attack_steps),
    }
    stages = autoattack.attacks(recipe.autoattack, eps=EPS, norm="Linf", seed=recipe.seed, classes=classes)
    record = evaluated(where)
    for name in (*single, "AutoAttack"):
        for numbers in torch.arange(len(test)).split(recipe.shard):
            shard = f"{int(numbers[0])}"
            done = record.setdefault(name, {})
            if shard in done:
                continue
            part, begun = test.take(numbers), time.monotonic()
            options: dict[str, Any] = {
                "batch_size": recipe.batch_size_attacked,
                "seed": recipe.seed,
                "numbers": numbers,
            }
            scratch = where / "attacked" / name / shard
            if name in single:
                outcome = evaluation.run(model, part, _stopping(single[name], stop), folder=scratch, **options)
                stood = {name: int(outcome.correct(part.labels).sum())}
            else:
                attacks = {stage: _stopping(attack, stop) for stage, attack in stages.items()}
                _, stood = evaluation.cascade(model, part, attacks, folder=scratch, **options)
            done[shard] = {"images": len(part), "stood": stood, "seconds": time.monotonic() - begun}
            files.write_text(where / "evaluation.json", json.dumps(record, indent=1) + "\n")
            shutil.rmtree(scratch)
            print(f"{name}, test images from {shard} on: {stood} of {len(part)} stand", flush=True)
    shutil.rmtree(where / "attacked", ignore_errors=True)


def weights(where: Path) -> Path:
    """The file of the finished weights."""
    return where / "target.safetensors"


def epochs(where: Path) -> list[dict[str, Any]]:
    """The epochs that have ended, as they were logged."""
    path = where / "epochs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def evaluated(where: Path) -> dict[str, dict[str, Any]]:
    """By attack and shard: how many images there are, how many stood after each of its stages, and seconds."""
    path = where / "evaluation.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _precision(device: torch.device) -> runtime.Precision:
    return "bf16" if device.type == "cuda" else "fp32"


def _objective(recipe: Recipe, target: nn.Module, guidance: nn.Module) -> Objective:
    attack: Any = {"eps": 0.031, "step_size": 0.007, "steps": recipe.steps}
    if recipe.method == "trades":
        return Trades(target, attack=attack, beta=6.0)
    return D2R(target, guidance, attack=attack, clean_weight=20.0, adv_weight=30.0)


def _stopping(attack: Attack, stop: Stop) -> Attack:
    """The attack, asked before each batch whether to stop."""

    def asked(model: nn.Module, x: Tensor, y: Tensor, noise: evaluation.Noise) -> Tensor:
        if reason := stop():
            raise Interrupted(f"{reason}; the batches attacked so far are kept: run it again to continue.")
        return attack(model, x, y, noise)

    return asked
