"""One model under the field's attacks: accuracies with their intervals, and whether they deserve trust."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2r_core import runtime
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import PGD, Clean, cw, fgsm, under_attack
from d2r_core.attacks.run import AttackCost, AttackResult, Progress, adversarial_images, run_attack
from d2r_core.data import Split
from d2r_core.evaluation import curves, probes
from d2r_core.evaluation.curves import EpsCurve, StepsCurve
from d2r_core.evaluation.self_checks import SelfCheck, run_self_checks
from d2r_core.evaluation.statistics import accuracy_per_class, accuracy_with_interval

_MEASURED_AGAIN = 32  # adversarial images whose pixels the self-checks look at


class ModelEvaluation(NamedTuple):
    """What is known of a model's robustness."""

    figures: dict[str, dict[str, Any]]  # by attack: clean, fgsm, pgd, cw, worst
    eps_curve: EpsCurve
    steps_curve: StepsCurve
    self_checks: list[SelfCheck]
    costs: dict[str, AttackCost]  # by attack, as figures, without clean and worst


def evaluate_model(model: nn.Module, images: Tensor, labels: Tensor, config: EvaluationConfig) -> ModelEvaluation:
    """Attack `model` on every image with FGSM, PGD and CW, draw its curves, and check that the attacks work.

    There is neither a black box nor another model to compare with: those two self-checks are skipped. Under torchrun
    every process calls it alike and gets the whole.

    Args:
        model: on config.device, in any mode: images (B, 3, H, W) in [0, 1] -> logits (B, C).
        images: (N, 3, H, W), uint8, or float in [0, 1].
        labels: int64 (N,), each less than C.

    Returns:
        Figures by attack: name, norm, eps, step size, steps, restarts, seed, accuracy (0 to 1), its 95 % interval
        (Wilson), how many of how many images are correct, and the accuracy per class. Under "worst" an image is correct
        if it is under every attack.

    Raises:
        ValueError: images or labels have another shape or type.
    """
    split = _split(images, labels)
    runtime.set_precision(config.precision)
    with under_attack(model):
        classes = probes.logits(model, split.take(torch.arange(1)), 1, config.device).shape[1]
    costs: dict[str, AttackCost] = {}
    results = run_attacks(model, split, config, costs=costs)
    figures = attack_figures(results, split.labels, classes, config)
    figures["worst"] = worst_figure(results.values(), split.labels, classes, config)
    eps_curve = curves.against_eps(model, split, config.cached_in("curve"))
    steps_curve = curves.against_steps(model, split, config.cached_in("curve"))
    first = split.take(torch.arange(min(_MEASURED_AGAIN, len(split))))
    x_adv = adversarial_images(model, first, config.pgd, replace(config, cache_folder=None))
    self_checks = run_self_checks(
        model,
        split,
        config.cached_in("checks"),
        eps_curve=eps_curve,
        steps_curve=steps_curve,
        distances={key: result.distances for key, result in results.items()},
        saved=(first.images, x_adv),
    )
    return ModelEvaluation(figures, eps_curve, steps_curve, self_checks, costs)


def standard_attacks(config: EvaluationConfig) -> dict[str, Clean | PGD]:
    """The attacks that run on every image, by the key of their figures."""
    return {
        "clean": Clean(),
        "fgsm": fgsm(config.eps, config.norm),
        "pgd": config.pgd,
        "cw": cw(
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
            norm=config.norm,
            restarts=config.restarts,
        ),
    }


def run_attacks(
    model: nn.Module,
    split: Split,
    config: EvaluationConfig,
    *,
    costs: dict[str, AttackCost] | None = None,
    progress: Progress | None = None,
) -> dict[str, AttackResult]:
    """The standard attacks on every image; `costs` gets an entry for each, `progress` hears of them as from cascade."""
    results: dict[str, AttackResult] = {}
    correct = len(split)
    for key, attack in standard_attacks(config).items():
        if progress:
            progress.begin(attack.name, len(split), correct)
        cost = AttackCost()
        results[key] = run_attack(model, split, attack, config.cached_in(key), cost=cost, progress=progress)
        if costs is not None and key != "clean":
            costs[key] = cost
        if key == "clean":
            correct = int(results[key].correct(split.labels.cpu()).sum())
    return results


def attack_figures(
    results: Mapping[str, AttackResult], labels: Tensor, classes: int, config: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """What is recorded of the standard attacks."""
    described = {
        key: {name: getattr(attack, name) for name in ("name", "eps", "step_size", "steps", "restarts")}
        for key, attack in standard_attacks(config).items()
    }
    return {
        key: figure(described[key], result.correct(labels.cpu()), labels, classes, config)
        for key, result in results.items()
    }


def worst_figure(
    results: Iterable[AttackResult], labels: Tensor, classes: int, config: EvaluationConfig
) -> dict[str, Any]:
    """What is recorded of all attacks together: an image is correct if it is under every one."""
    correct = torch.stack([result.correct(labels.cpu()) for result in results]).all(0)
    described = {"step_size": config.step_size, "steps": config.steps, "restarts": config.restarts}
    return figure({"name": "worst of these", **described}, correct, labels, classes, config)


def figure(
    described: Mapping[str, Any], correct: Tensor, labels: Tensor, classes: int, config: EvaluationConfig
) -> dict[str, Any]:
    """An accuracy with everything that it rests on.

    Args:
        described: the attack's name, step_size, steps and restarts, and eps where it is not the evaluation's.
        correct: bool (N,), beside labels (N,).
    """
    return {
        "norm": config.norm,
        "eps": config.eps,
        "seed": config.seed,
        **described,
        **accuracy_with_interval(correct),
        "per_class": accuracy_per_class(correct, labels.cpu(), classes),
    }


def _split(images: Tensor, labels: Tensor) -> Split:
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 or float (N, 3, H, W).")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},).")
    if images.is_floating_point() and (images.min() < 0 or images.max() > 1):
        raise ValueError(f"images lie between {images.min():.4g} and {images.max():.4g}; expected 0 to 1.")
    return Split(images, labels)
