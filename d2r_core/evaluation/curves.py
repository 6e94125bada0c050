"""Robust accuracy against eps and against the number of steps, under PGD (Carlini et al. 2019)."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import Clean
from d2r_core.attacks.run import Attack, run_attack
from d2r_core.data import Split
from d2r_core.evaluation.statistics import accuracy_with_interval

_FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the evaluation's eps; from there it doubles
_STEPS = (1, 2, 5, 10, 20, 50, 100)
_BEYOND = 5  # times the evaluation's steps, where the curve against the steps ends


class EpsCurve(NamedTuple):
    points: list[dict[str, Any]]  # eps ascending from 0: eps, accuracy, interval, correct, images
    smallest_eps: Tensor  # float64 (N,): the first eps of the curve at which each image is misclassified; inf at none

    def robust(self, eps: float) -> Tensor:
        """bool (N,): the images that are robust at `eps`."""
        return self.smallest_eps > eps

    def median_perturbation(self) -> "MedianPerturbation | None":
        """0 where half of the images are misclassified as they are; None if more than half are robust at the end."""
        below = [number for number, point in enumerate(self.points) if point["accuracy"] <= 0.5]
        if not below:
            return None
        if below[0] == 0:
            return MedianPerturbation(0.0, 0.0, 0.0)
        before, after = self.points[below[0] - 1 : below[0] + 1]
        share = (before["accuracy"] - 0.5) / (before["accuracy"] - after["accuracy"])
        value = before["eps"] + share * (after["eps"] - before["eps"])
        return MedianPerturbation(value, before["eps"], after["eps"])


class MedianPerturbation(NamedTuple):
    """The median over the images of the smallest perturbation that misleads the model, as far as PGD finds it."""

    value: float  # interpolated linearly between the two
    above: float  # the largest radius of the curve at which more than half of the images are robust
    at_most: float  # the next one


class StepsCurve(NamedTuple):
    points: list[dict[str, Any]]  # steps ascending: steps, accuracy, interval, correct, images
    robust: Tensor  # bool (points, N): the images that are right after so many steps


def against_eps(
    model: nn.Module, split: Split, config: EvaluationConfig, *, image_ids: Tensor | None = None
) -> EpsCurve:
    """The evaluation's PGD from eps 0 up to where no image is robust, at most to where a ball holds all images.

    An image that is misclassified counts as misclassified at every larger eps, whose ball holds the same adversarial
    image, and is attacked no more. The step size grows with eps; the evaluation's eps is a point of the curve.

    Args:
        image_ids: as run_attack takes them.
    """
    image_ids = torch.arange(len(split)) if image_ids is None else image_ids
    smallest = torch.full((len(split),), torch.inf, dtype=torch.float64)
    points: list[dict[str, Any]] = []
    for radius in (0.0, *_radii(config.eps, config.norm, split.images[0].numel())):
        robust = smallest.isinf().nonzero().squeeze(1)
        if points and not len(robust):
            break
        part = split.take(robust.to(split.labels.device))
        cached = config.cached_in(f"eps {radius:.6g}")
        result = run_attack(model, part, _pgd_at(radius, config), cached, image_ids=image_ids[robust])
        smallest[robust[~result.correct(part.labels.cpu())]] = radius
        points.append({"eps": radius, **accuracy_with_interval(smallest.isinf())})
    return EpsCurve(points, smallest)


def against_steps(
    model: nn.Module, split: Split, config: EvaluationConfig, *, image_ids: Tensor | None = None
) -> StepsCurve:
    """A run of PGD of its own for 1, 2, 5, ... steps, to 100 or five times the evaluation's `steps`.

    Each has the step size 2.5 eps / steps (Madry et al. 2018) and counts its last iterate alone, so that nothing but
    the attack's success makes a longer run the stronger one: on a model that hides its gradients it may well fail.

    Args:
        image_ids: as run_attack takes them.
    """
    last = max(_STEPS[-1], _BEYOND * config.steps)
    points, robust = [], []
    for steps in (*_STEPS, *([last] if last > _STEPS[-1] else [])):
        attack = replace(config.pgd, step_size=2.5 * config.eps / steps, steps=steps, restarts=1, any_iterate=False)
        result = run_attack(model, split, attack, config.cached_in(f"steps {steps}"), image_ids=image_ids)
        robust.append(result.correct(split.labels.cpu()))
        points.append({"steps": steps, **accuracy_with_interval(robust[-1])})
    return StepsCurve(points, torch.stack(robust))


def _pgd_at(radius: float, config: EvaluationConfig) -> Attack:
    """The evaluation's PGD at another radius, its step size in proportion."""
    step_size = config.step_size * radius / config.eps
    return replace(config.pgd, eps=radius, step_size=step_size) if radius else Clean()


def _radii(eps: float, norm: Norm, pixels: int) -> list[float]:
    """Ascending, to the radius of a ball around any image that holds all others."""
    largest = 1.0 if norm == "Linf" else pixels**0.5
    radii = [fraction * eps for fraction in _FRACTIONS]
    while radii[-1] < largest:
        radii.append(2 * radii[-1])
    return [radius for radius in radii if radius < largest] + [largest]
