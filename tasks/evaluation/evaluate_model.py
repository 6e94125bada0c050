"""One model under every attack of the settings: accuracies with their intervals, and what it said of each image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from d2r_core import distributed, runtime
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.run import Attack, Outcome
from d2r_core.data import Split, balanced_order
from d2r_core.evaluation.curves import counts
from tasks.config.settings import Evaluate
from tasks.evaluation.progress import Progress, Step


class Measurement(NamedTuple):
    """One model's figures, and what it said of every test image."""

    figures: dict[str, dict[str, Any]]  # by attack, as in robustness.json
    examples: pd.DataFrame  # attack, index, label, prediction, margin, correct, distance


def measure(
    model: nn.Module,
    split: Split,
    settings: Evaluate,
    *,
    classes: int,
    seed: int,
    description: str = "",
    folder: Path | None = None,
) -> Measurement:
    """Attack `model` (on its device, in any mode) on every image of `split`.

    AutoAttack runs on a class-balanced subset of `settings.autoattack_images`, and is left out at 0. Under torchrun
    every process calls it alike and gets the whole.

    Args:
        folder: where finished batches are kept, and found by a call that repeats an interrupted one; see
            evaluation.run.
    """
    from tasks.evaluation import autoattack

    runtime.set_precision(settings.precision)
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": seed,
        "norm": settings.norm,
        "precision": settings.precision,
    }
    common = {"norm": settings.norm, "eps": settings.eps, "seed": seed}
    whole = _on_all_images(settings)
    stages = autoattack.attacks(settings.autoattack, eps=settings.eps, norm=settings.norm, seed=seed, classes=classes)
    subset = balanced_order(split.labels, seed)[: settings.autoattack_images].sort().values
    plan = [Step(what["name"], len(split), passes) for what, _, passes in whole.values()]
    plan += [Step(name, len(subset), autoattack.passes(name, classes)) for name in (stages if len(subset) else [])]
    figures: dict[str, dict[str, Any]] = {}
    frames: list[pd.DataFrame] = []

    def record(key: str, what: Mapping[str, Any], outcome: Outcome, index: Tensor) -> Tensor:
        labels = split.labels[index]
        correct = outcome.correct(labels)
        figures[key] = {**common, **what, **_counts(correct, labels, classes)}
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

    right = standing = torch.ones(len(split), dtype=torch.bool)
    with Progress(description, model, plan, show=distributed.rank() == 0) as progress:
        for key, (what, attack, _) in whole.items():
            progress.begin(what["name"], int(right.sum()))
            kept = folder / key if folder else None
            outcome = evaluation.run(model, split, attack, folder=kept, **options)
            correct = record(key, what, outcome, torch.arange(len(split)))
            standing = standing & correct
            right = correct if key == "clean" else right
        if len(subset):
            kept = folder / "autoattack" if folder else None
            outcome, stood = evaluation.cascade(
                model, split.take(subset), stages, numbers=subset, folder=kept, begin=progress.begin, **options
            )
            correct = record("autoattack", _autoattack(settings, stood, len(subset)), outcome, subset)
            if len(subset) == len(split):
                standing = standing & correct
    worst = {"name": "worst of these", **_steps(settings)}
    figures["worst"] = {**common, **worst, **_counts(standing, split.labels, classes)}
    return Measurement(figures, pd.concat(frames, ignore_index=True))


def _on_all_images(settings: Evaluate) -> dict[str, tuple[dict[str, Any], Attack, int]]:
    """The attacks that run on every test image: what is said of them, the attack, and its passes."""
    eps, norm, steps = settings.eps, settings.norm, _steps(settings)
    none = {"eps": 0.0, "step_size": 0.0, "steps": 0, "restarts": 0}
    passes = 2 + settings.restarts * (2 * settings.steps + 1)
    return {
        "clean": ({"name": "clean", **none}, evaluation.clean(), 1),
        "fgsm": ({"name": "FGSM", "step_size": eps, "steps": 1, "restarts": 1}, evaluation.fgsm(eps, norm), 5),
        "pgd": ({"name": f"PGD-{settings.steps}", **steps}, evaluation.pgd(eps, norm=norm, **steps), passes),
        "cw": ({"name": f"CW-{settings.steps}", **steps}, evaluation.cw(eps, norm=norm, **steps), passes),
    }


def _autoattack(settings: Evaluate, stood: Mapping[str, int], images: int) -> dict[str, Any]:
    return {
        "name": "AutoAttack standard" if settings.autoattack == "standard" else f"{' + '.join(stood)} (quick)",
        "stages": [{"name": name, "accuracy": count / images} for name, count in stood.items()],
        **dict.fromkeys(("step_size", "steps", "restarts")),  # it sets them itself
    }


def _steps(settings: Evaluate) -> dict[str, Any]:
    return {"step_size": settings.step_size, "steps": settings.steps, "restarts": settings.restarts}


def _counts(correct: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    return {**counts(correct), "per_class": evaluation.accuracy_per_class(correct, labels, classes)}
