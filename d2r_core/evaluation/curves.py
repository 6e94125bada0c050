"""Robust accuracy against eps and against the number of steps, under PGD (Carlini et al. 2019)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.attacks import norms
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import under_attack
from d2r_core.attacks.run import Attack, Noise
from d2r_core.data import Split
from d2r_core.evaluation.statistics import wilson
from d2r_core.runtime import at_least_fp32

_FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the evaluation's eps; from there it doubles
_STEPS = (1, 2, 5, 10, 20, 50, 100)
_BEYOND = 5  # times the evaluation's steps, where the curve against the steps ends


class EpsCurve(NamedTuple):
    points: list[dict[str, Any]]  # eps ascending from 0: eps, accuracy, interval, correct, images
    smallest_eps: Tensor  # float64 (N,): the first eps of the curve at which each image has fallen; inf at none

    def standing(self, eps: float) -> Tensor:
        """bool (N,): the images right at `eps`."""
        return self.smallest_eps > eps


class StepsCurve(NamedTuple):
    points: list[dict[str, Any]]  # steps ascending: steps, accuracy, interval, correct, images
    standing: Tensor  # bool (points, N): the images right after so many steps


def against_eps(
    model: nn.Module,
    split: Split,
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int = 1,
    norm: Norm = "Linf",
    numbers: Tensor | None = None,
    folder: Path | None = None,
    **options: Any,
) -> EpsCurve:
    """The evaluation's PGD from eps 0 up to where no image stands, at most to where a ball holds all images.

    An image that has fallen counts as fallen at every larger eps, whose ball holds the same adversarial image, and is
    attacked no more. The step size grows with eps; `eps` itself is a point of the curve.

    Args:
        numbers, folder, options: as evaluation.run takes them.
    """
    numbers = torch.arange(len(split)) if numbers is None else numbers
    smallest = torch.full((len(split),), torch.inf, dtype=torch.float64)
    points: list[dict[str, Any]] = []
    for radius in (0.0, *_radii(eps, norm, split.images[0].numel())):
        standing = smallest.isinf().nonzero().squeeze(1)
        if points and not len(standing):
            break
        outcome = evaluation.run(
            model,
            split.take(standing.to(split.labels.device)),
            evaluation.pgd(radius, step_size * radius / eps, steps, norm, restarts) if radius else evaluation.clean(),
            norm=norm,
            numbers=numbers[standing],
            folder=folder / f"eps {radius:.6g}" if folder else None,
            **options,
        )
        fallen = ~outcome.correct(split.labels[standing.to(split.labels.device)].cpu())
        smallest[standing[fallen]] = radius
        points.append({"eps": radius, **counts(smallest.isinf())})
    return EpsCurve(points, smallest)


def against_steps(
    model: nn.Module,
    split: Split,
    *,
    eps: float,
    steps: int,
    norm: Norm = "Linf",
    folder: Path | None = None,
    **options: Any,
) -> StepsCurve:
    """A run of PGD of its own for 1, 2, 5, ... steps, to 100 or five times the evaluation's `steps`.

    Each has the step size 2.5 eps / steps (Madry et al. 2018) and counts its last iterate alone, so that nothing but
    the attack's success makes a longer run the stronger one: on a model that hides its gradients it may well fail.

    Args:
        folder, options: as evaluation.run takes them.
    """
    last = max(_STEPS[-1], _BEYOND * steps)
    points, standing = [], []
    for count in (*_STEPS, *([last] if last > _STEPS[-1] else [])):
        attack = last_iterate(eps, 2.5 * eps / count, count, norm)
        kept = folder / f"steps {count}" if folder else None
        outcome = evaluation.run(model, split, attack, norm=norm, folder=kept, **options)
        standing.append(outcome.correct(split.labels.cpu()))
        points.append({"steps": count, **counts(standing[-1])})
    return StepsCurve(points, torch.stack(standing))


def last_iterate(eps: float, step_size: float, steps: int, norm: Norm = "Linf") -> Attack:
    """PGD as published: all steps for every image, whatever the model says on the way."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x_adv = (x + norms.start(noise(0), eps, norm)).clamp(0.0, 1.0)
        with under_attack(model):
            for _ in range(steps):
                x_adv.requires_grad_()
                with torch.enable_grad():
                    loss = F.cross_entropy(at_least_fp32(model(x_adv)), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x_adv)
                delta = x_adv.detach() + norms.steepest(gradient, step_size, norm) - x
                x_adv = (x + norms.project(delta, eps, norm)).clamp(0.0, 1.0)
        return x_adv

    return attack


def counts(correct: Tensor) -> Mapping[str, Any]:
    """What is recorded of an accuracy: itself, its 95 % interval, and what they stand on."""
    right, images = int(correct.sum()), len(correct)
    return {"accuracy": right / images, "interval": list(wilson(right, images)), "correct": right, "images": images}


def _radii(eps: float, norm: Norm, pixels: int) -> list[float]:
    """Ascending, to the radius of a ball around any image that holds all others."""
    largest = 1.0 if norm == "Linf" else pixels**0.5
    radii = [fraction * eps for fraction in _FRACTIONS]
    while radii[-1] < largest:
        radii.append(2 * radii[-1])
    return [radius for radius in radii if radius < largest] + [largest]
