"""Stage `evaluate`: both models under attack on the test images; writes the figures that gate and report read."""

import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from d2r_core import checkpoint, evaluation, files, runtime
from d2r_core.attacks import under_attack
from d2r_core.data import Split, balanced_order, load_split, to_float
from d2r_core.evaluation import Attack, Outcome
from tasks import lineage, stage
from tasks.paths import Paths
from tasks.settings import Evaluate, Settings

_GALLERY = 32  # images


class Measurement(NamedTuple):
    """One model's figures, and what it said of every test image."""

    figures: dict[str, dict[str, Any]]  # by attack: accuracy, counts, eps, steps; see robustness.json
    examples: pd.DataFrame  # attack, index, label, prediction, margin, correct, distance


def measure(
    model: nn.Module, split: Split, settings: Evaluate, *, classes: int, seed: int, description: str = ""
) -> Measurement:
    """Attack `model` (on its device, in any mode) on every image of `split`, in fp32.

    AutoAttack runs on a class-balanced subset of `settings.autoattack_images`, and is left out at 0.
    """
    from tasks import autoattack

    runtime.set_precision(settings.precision)
    eps, norm = settings.eps, settings.norm
    common: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed}
    steps: dict[str, Any] = {"step_size": settings.step_size, "steps": settings.steps, "restarts": settings.restarts}
    one_step = {"step_size": eps, "steps": 1, "restarts": 1}
    none = {"eps": 0.0, "step_size": 0.0, "steps": 0, "restarts": 0}
    planned: list[tuple[str, dict[str, Any], Attack]] = [
        ("clean", {"name": "clean", **common, **none}, evaluation.clean()),
        ("fgsm", {"name": "FGSM", **common, **one_step}, evaluation.fgsm(eps, norm)),
        ("pgd", {"name": f"PGD-{settings.steps}", **common, **steps}, evaluation.pgd(eps, norm=norm, **steps)),
        ("cw", {"name": f"CW-{settings.steps}", **common, **steps}, evaluation.cw(eps, norm=norm, **steps)),
    ]
    figures: dict[str, dict[str, Any]] = {}
    frames: list[pd.DataFrame] = []

    def record(key: str, what: Mapping[str, Any], outcome: Outcome, index: Tensor) -> Tensor:
        labels = split.labels[index]
        correct = outcome.correct(labels)
        figures[key] = {**what, **_counts(correct, labels, classes)}
        columns = {
            "attack": key,
            "index": index.numpy(),
            "label": labels.numpy(),
            "prediction": outcome.predictions.numpy(),
            "margin": outcome.margins.numpy(),
            "correct": correct.numpy(),
            "distance": outcome.distances.numpy(),
        }
        frames.append(pd.DataFrame(columns))
        return correct

    everything = torch.arange(len(split))
    standing = torch.ones(len(split), dtype=torch.bool)
    for key, what, attack in tqdm(planned, desc=description, disable=None, leave=False, file=sys.stderr):
        outcome = evaluation.run(
            model,
            split,
            attack,
            batch_size=settings.batch_size,
            seed=seed,
            norm=norm,
            precision=settings.precision,
        )
        standing &= record(key, what, outcome, everything)
    worst = {"name": "worst of these", **common, **steps}
    figures["worst"] = {**worst, **_counts(standing, split.labels, classes)}
    if settings.autoattack_images:
        index = balanced_order(split.labels, seed)[: settings.autoattack_images]
        stages = autoattack.attacks(settings.autoattack, eps=eps, norm=norm, seed=seed, classes=classes)
        outcome, stood = evaluation.cascade(
            model,
            split.take(index),
            stages,
            numbers=index,
            batch_size=settings.batch_size,
            seed=seed,
            norm=norm,
            precision=settings.precision,
        )
        name = "AutoAttack standard" if settings.autoattack == "standard" else f"{' + '.join(stages)} (quick)"
        accuracies = [{"name": stage, "accuracy": count / len(index)} for stage, count in stood.items()]
        itself = {"step_size": None, "steps": None, "restarts": None}
        record("autoattack", {"name": name, "stages": accuracies, **common, **itself}, outcome, index)
    return Measurement(figures, pd.concat(frames, ignore_index=True))


def run(settings: Settings, paths: Paths) -> dict[str, dict[str, float]]:
    """Measure target and guidance model; write robustness.json, metrics.json, examples.parquet and the gallery."""
    device = runtime.device(settings.runtime.device)
    manifest = lineage.manifest(paths)
    test = load_split(paths.prepared / "test.safetensors")
    models = {"guidance": checkpoint.load(paths.guidance, device), "target": checkpoint.load(paths.target, device)}
    measured = {
        name: measure(
            model, test, settings.evaluate, classes=len(manifest["classes"]), seed=settings.seed, description=name
        )
        for name, (model, _) in models.items()
    }
    robustness = {
        "data": {
            "source": manifest["source"],
            "hash": manifest["hash"],
            "classes": manifest["classes"],
            "test_images": len(test),
        },
        "seed": settings.seed,
        "precision": settings.evaluate.precision,
        "device": str(device),
        "norm": settings.evaluate.norm,
        "settings_hash": settings.hash("seed", "evaluate"),
        "models": {
            name: {
                "architecture": metadata["architecture"],
                "weights_sha256": metadata["weights_sha256"],
                "attacks": measured[name].figures,
            }
            for name, (_, metadata) in models.items()
        },
    }
    metrics = {
        name: {key: figure["accuracy"] for key, figure in measurement.figures.items()}
        for name, measurement in measured.items()
    }
    examples = pd.concat(
        [measurement.examples.assign(model=name) for name, measurement in measured.items()], ignore_index=True
    )
    gallery = _gallery({name: model for name, (model, _) in models.items()}, test, settings)
    with files.atomic(paths.examples) as temporary:
        examples.to_parquet(temporary, index=False)
    with files.atomic(paths.gallery) as temporary:
        save_file(gallery, temporary)
    files.write_text(paths.robustness, json.dumps(robustness, indent=2) + "\n")
    files.write_text(paths.metrics, json.dumps(metrics, indent=2) + "\n")
    for name, accuracies in metrics.items():
        print(f"{name}: {', '.join(f'{key} {value:.2%}' for key, value in accuracies.items())}", flush=True)
    return metrics


def _counts(correct: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    return {
        "accuracy": evaluation.accuracy(correct),
        "correct": int(correct.sum()),
        "images": len(correct),
        "per_class": evaluation.accuracy_per_class(correct, labels, classes),
    }


def _gallery(models: Mapping[str, nn.Module], test: Split, settings: Settings) -> dict[str, Tensor]:
    """A few class-balanced test images with their PGD twins for each model, and what each model says of both."""
    evaluate = settings.evaluate
    index = balanced_order(test.labels, settings.seed)[:_GALLERY]
    chosen = test.take(index)
    tensors = {"index": index, "labels": chosen.labels, "clean": chosen.images}
    attack = evaluation.pgd(evaluate.eps, evaluate.step_size, evaluate.steps, evaluate.norm, evaluate.restarts)
    for name, model in models.items():
        device = next(model.parameters()).device
        with under_attack(model), torch.no_grad():
            x_adv = evaluation.perturb(model, chosen, attack, batch_size=len(chosen), seed=settings.seed, numbers=index)
            tensors[f"{name}_adversarial"] = x_adv.contiguous()
            tensors[f"{name}_clean_prediction"] = model(to_float(chosen.images).to(device)).argmax(1).cpu()
            tensors[f"{name}_adversarial_prediction"] = model(x_adv.to(device)).argmax(1).cpu()
    return tensors


if __name__ == "__main__":
    stage.main(run)
