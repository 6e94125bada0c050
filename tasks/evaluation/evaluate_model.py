"""One model under every attack of the settings: d2r_core's, and AutoAttack; with what it says of each image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from d2r_core import distributed, runtime
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import AttackCost, AttackResult, cascade
from d2r_core.data import Split, balanced_order
from d2r_core.evaluation.evaluate_model import attack_figures, figure, run_attacks, standard_attacks, worst_figure
from tasks.config.settings import Evaluate
from tasks.evaluation.progress import Progress, Step


class ModelFigures(NamedTuple):
    """One model's figures, and what it says of every test image."""

    figures: dict[str, dict[str, Any]]  # by attack, as in robustness.json
    examples: pd.DataFrame  # attack, index, label, prediction, margin, correct, distance
    costs: dict[str, AttackCost]  # by attack, without clean and worst


def evaluation_config(
    settings: Evaluate, *, seed: int, device: torch.device, cache_folder: Path | None = None
) -> EvaluationConfig:
    """The settings as d2r_core takes them."""
    return EvaluationConfig(
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
        norm=settings.norm,
        precision=settings.precision,
        cache_folder=cache_folder,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        restarts=settings.restarts,
    )


def evaluate_model(
    model: nn.Module,
    split: Split,
    settings: Evaluate,
    *,
    classes: int,
    seed: int,
    description: str = "",
    cache_folder: Path | None = None,
) -> ModelFigures:
    """Attack `model` (on its device, in any mode) on every image of `split`.

    AutoAttack runs on a class-balanced subset of `settings.autoattack_images`, and is left out at 0; among the worst
    it counts if the subset is the whole. Under torchrun every process calls it alike and gets the whole.

    Args:
        description: what the model is called while it is attacked.
        cache_folder: as EvaluationConfig has it.
    """
    from tasks.evaluation import autoattack

    runtime.set_precision(settings.precision)
    device = next(model.parameters()).device
    config = evaluation_config(settings, seed=seed, device=device, cache_folder=cache_folder)
    subset = balanced_order(split.labels, seed)[: settings.autoattack_images].sort().values
    level = settings.autoattack
    attacks = autoattack.attacks(level, eps=config.eps, norm=config.norm, seed=seed, classes=classes)
    plan = [Step(attack.name, len(split), attack.passes) for attack in standard_attacks(config).values()]
    plan += [Step(attack.name, len(subset), attack.passes) for attack in attacks if len(subset)]
    with Progress(description, model, plan, show=distributed.rank() == 0) as progress:
        costs: dict[str, AttackCost] = {}
        results = run_attacks(model, split, config, costs=costs, progress=progress)
        figures = attack_figures(results, split.labels, classes, config)
        examples = [_examples(key, result, split.labels, torch.arange(len(split))) for key, result in results.items()]
        if len(subset):
            part, cached = split.take(subset), config.cached_in("autoattack")
            cost = costs["autoattack"] = AttackCost()
            result, robust_after = cascade(model, part, attacks, cached, image_ids=subset, cost=cost, progress=progress)
            described = _autoattack(settings, robust_after, len(subset))
            figures["autoattack"] = figure(described, result.correct(part.labels), part.labels, classes, config)
            examples.append(_examples("autoattack", result, part.labels, subset))
            if len(subset) == len(split):
                results["autoattack"] = result
    figures["worst"] = worst_figure(results.values(), split.labels, classes, config)
    return ModelFigures(figures, pd.concat(examples, ignore_index=True), costs)


def _examples(key: str, result: AttackResult, labels: Tensor, image_ids: Tensor) -> pd.DataFrame:
    """One row for each image; labels and image_ids are (N,)."""
    columns = {
        "attack": key,
        "index": image_ids.numpy(),
        "label": labels.numpy(),
        "prediction": result.predictions.numpy(),
        "margin": result.margins.numpy(),
        "correct": result.correct(labels).numpy(),
        "distance": result.distances.numpy(),
    }
    return pd.DataFrame(columns)


def _autoattack(settings: Evaluate, robust_after: Mapping[str, int], images: int) -> dict[str, Any]:
    return {
        "name": "AutoAttack standard" if settings.autoattack == "standard" else f"{' + '.join(robust_after)} (quick)",
        "stages": [{"name": name, "accuracy": count / images} for name, count in robust_after.items()],
        **dict.fromkeys(("step_size", "steps", "restarts")),  # it sets them itself
    }
