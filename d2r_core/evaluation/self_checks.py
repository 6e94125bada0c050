"""Does the evaluation deserve trust? Checks after Carlini et al. 2019 (section 5), Athalye et al. 2018, and AutoAttack.

A model that hides its gradients looks robust to the attacks that need them. Each check asks for something that holds
wherever they work, and fails where they do not. docs/evaluation.md explains each under its key.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2r_core import runtime
from d2r_core.attacks import norms
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import under_attack
from d2r_core.attacks.run import Attack
from d2r_core.data import Split
from d2r_core.evaluation import probes
from d2r_core.evaluation.curves import EpsCurve, StepsCurve
from d2r_core.evaluation.statistics import RESOLUTION, Comparison
from d2r_core.runtime import Precision

_ROUNDING: Mapping[Precision, float] = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # of the largest logit
_PIXEL = 1e-6  # what fp32 may add to a pixel's distance, with room to spare
_LOSSES = 0.1  # the share of the images by which one loss may beat the other; see losses
_QUARTER = 0.25  # of eps; see noise

# The keys of all checks, in their order.
SELF_CHECKS: tuple[str, ...] = (
    "more_steps",
    "large_eps",
    "black_box",
    "transfer",
    "losses",
    "gradients",
    "noise",
    "logits",
    "eval_mode",
    "perturbation",
)


class Check(NamedTuple):
    key: str
    name: str  # what is expected
    passed: bool | None  # None: could not be asked
    found: str  # one sentence with the figures


def examine(
    model: nn.Module,
    split: Split,
    *,
    eps_curve: EpsCurve,
    steps_curve: StepsCurve,
    distances: Mapping[str, Tensor],
    saved: tuple[Tensor, Tensor],
    eps: float,
    step_size: float,
    steps: int,
    batch_size: int,
    seed: int,
    norm: Norm = "Linf",
    other: tuple[str, nn.Module] | None = None,
    black_box: Attack | None = None,
    precision: Precision = "fp32",
    numbers: Tensor | None = None,
    folder: Path | None = None,
) -> list[Check]:
    """All self-checks of `model`, on the images of its two curves.

    Args:
        eps_curve, steps_curve: of this model on `split`; see curves.
        distances: by attack, the sizes of the perturbations as recorded, float64 (N,) of whatever images.
        saved: clean images uint8 (G, 3, H, W) and their adversarial ones float32, as recorded.
        eps, step_size, steps, norm: of the evaluation's PGD.
        other: what another model is called, and the model: its adversarial images must not fool this one better.
        black_box: an attack at `eps` that uses no gradients (AutoAttack's Square).
        batch_size, seed, precision, numbers, folder: as evaluation.run takes them.

    Under torchrun every process calls it alike and gets all checks.
    """
    numbers = torch.arange(len(split)) if numbers is None else numbers
    clean, white = eps_curve.standing(0.0), eps_curve.standing(eps)

    def standing(key: str, attack: Attack) -> Tensor:
        """The images right clean and under `attack`."""
        outcome = evaluation.run(
            model,
            split,
            attack,
            batch_size=batch_size,
            seed=seed,
            norm=norm,
            precision=precision,
            numbers=numbers,
            folder=folder / key if folder else None,
        )
        return outcome.correct(split.labels.cpu()) & clean

    before = probes.state(model)
    with under_attack(model), runtime.autocast(next(model.parameters()).device, precision):
        training = any(module.training for module in model.modules())
        answers, again = (
            probes.logits(model, split, size) for size in (batch_size, max(1, min(batch_size, len(split)) // 2))
        )
        sizes = probes.gradient_sizes(model, split, eps, norm, batch_size=batch_size, seed=seed, numbers=numbers)
    queried = standing("black_box", black_box) if black_box else None
    crafted = standing("transfer", probes.crafted_on(other[1], eps, step_size, steps, norm)) if other else None
    noisy = standing("noise", probes.random_step(eps, norm))
    found = [
        more_steps(steps_curve, clean),
        large_eps(eps_curve),
        score_based(queried, white),
        transfer(crafted, white, other[0] if other else ""),
        losses(standing("margin", evaluation.cw(eps, step_size, steps, norm)), white),
        gradients(sizes[:, clean]),
        noise(noisy, eps_curve.standing(_QUARTER * eps), clean, eps),
        logits(answers),
    ]
    after = probes.state(model)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return [
        *found,
        eval_mode(answers, again, training=training, changed=changed, precision=precision),
        perturbation(distances, saved, eps, norm),
    ]


def more_steps(curve: StepsCurve, clean: Tensor) -> Check:
    """No longer run of PGD may be weaker than a shorter one."""
    runs = curve.standing & clean
    numbers = [point["steps"] for point in curve.points]
    compared = {
        (fewer, more): Comparison.of(runs[first], runs[second])
        for (first, fewer), (second, more) in combinations(enumerate(numbers), 2)
    }
    (fewer, more), worst = min(compared.items(), key=lambda item: (item[1].holds(), item[1].chance))
    accuracies = ", ".join(
        f"{number}: {evaluation.accuracy(run):.1%}" for number, run in zip(numbers, runs, strict=True)
    )
    found = f"Accuracy by number of steps is {accuracies}"
    if not worst.holds():
        found += f"; {fewer} steps fool {worst.exceptions} images that {more} do not, and {worst.others} the other way"
    return Check("more_steps", "More steps are never weaker", worst.holds(), f"{found}.")


def large_eps(curve: EpsCurve) -> Check:
    """A ball that holds every image holds one of another class: nothing may stand."""
    last = curve.points[-1]
    found = f"At eps {last['eps']:.4g}, {last['correct']} of {last['images']} images stand."
    return Check("large_eps", "A large eps fools every image", last["correct"] == 0, found)


def score_based(queried: Tensor | None, white: Tensor) -> Check:
    """An attack that does not see the gradients must be no stronger than PGD, which does."""
    name = "White box is at least as strong as black box"
    if queried is None:
        return Check("black_box", name, None, "There was no black-box attack.")
    return Check("black_box", name, *_against_pgd(queried, white, "the black box"))


def transfer(crafted: Tensor | None, white: Tensor, other: str) -> Check:
    """Nor must what fools another model."""
    name = "White box is at least as strong as transfer"
    if crafted is None:
        return Check("transfer", name, None, "There was no other model.")
    return Check("transfer", name, *_against_pgd(crafted, white, f"what fools the {other}"))


def losses(margin: Tensor, white: Tensor) -> Check:
    """PGD on the cross-entropy must find about what it finds on the margin, however the logits are scaled or bent."""
    name = "The cross-entropy is about as strong as the margin loss"
    return Check("losses", name, *_against_pgd(margin, white, "the margin loss", share=_LOSSES))


def gradients(sizes: Tensor) -> Check:
    """PGD is blind where the loss has no gradient.

    Args:
        sizes: the largest component of the gradient of each image that the model gets right, at two points, (2, N).
    """
    name = "Gradients are neither zero nor NaN"
    if not sizes.shape[1]:
        return Check("gradients", name, None, "The model gets no image right, so there is nothing to attack.")
    images = sizes.shape[1]
    broken = int((~sizes.isfinite()).any(0).sum())
    blind = int((sizes == 0).any(0).sum())
    found = f"Of {images} images, the loss has a zero gradient at {blind}, and one that is not finite at {broken}."
    return Check("gradients", name, not broken and blind <= RESOLUTION * images, found)


def noise(noisy: Tensor, quarter: Tensor, clean: Tensor, eps: float) -> Check:
    """A random step of length eps must be no stronger than PGD at a quarter of it.

    In D dimensions, on a boundary that is flat at this scale, noise is as harmful as an attack of about eps / sqrt(D)
    (Fawzi et al. 2016): two of its standard deviations are a sixth of eps at 8 x 8 pixels, a 20th at 32 x 32.
    """
    compared = Comparison.of(noisy, quarter)
    right = int(clean.sum())
    found = (
        f"Of {right} images, random noise of size {eps:.4g} fools {right - int(noisy.sum())}, "
        f"PGD at a quarter of it {right - int(quarter.sum())}."
    )
    return Check("noise", "Random noise is almost harmless", compared.holds(), found)


def logits(answers: Tensor) -> Check:
    """Losses expect logits: of probabilities, or of logarithms that were saturated, their gradients vanish.

    Args:
        answers: the model's outputs, float32 (N, C).
    """
    images = len(answers)
    lowest, highest = float(answers.min()), float(answers.max())
    broken = int((~answers.isfinite()).any(1).sum())
    certain = int((answers.amax(1) == 0).sum())
    normalised = bool((answers.logsumexp(1).abs() < 1e-3).all())
    passed, found = False, f"The outputs lie between {lowest:.3g} and {highest:.3g}"
    if broken:
        found = f"The outputs of {broken} of {images} images are not finite"
    elif lowest >= 0 and highest <= 1:
        found += f": {'probabilities' if ((answers.sum(1) - 1).abs() < 1e-3).all() else 'not the range of logits'}"
    elif normalised and certain:
        found += f": logarithms of probabilities, rounded to 1 for {certain} of {images} images"
    else:
        passed = True
    return Check("logits", "The outputs are logits", passed, f"{found}.")


def eval_mode(answers: Tensor, again: Tensor, *, training: bool, changed: list[str], precision: Precision) -> Check:
    """Dropout, noise and BatchNorm's batch statistics make a moving target; random answers are no robustness.

    Args:
        answers, again: the outputs on the same images in two batch sizes, float32 (N, C).
        training: whether any module is in training mode.
        changed: parameters and buffers that the attacks changed.
    """
    moved = float((answers - again).abs().max() / answers.abs().max().clamp_min(1e-30))
    found = f"Asked twice in other batches, the outputs differ by {moved:.1g} of the largest one"
    if training:
        found += "; a module is in training mode"
    if changed:
        found += f"; the attacks changed {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}"
    passed = moved <= _ROUNDING[precision] and not training and not changed
    return Check("eval_mode", "The model is in eval mode and deterministic", passed, f"{found}.")


def perturbation(distances: Mapping[str, Tensor], saved: tuple[Tensor, Tensor], eps: float, norm: Norm) -> Check:
    """What was recorded must lie within eps and [0, 1], measured in fp64."""
    clean, adversarial = (images.cpu() for images in saved)
    sizes = {**distances, "saved": norms.size(adversarial.double() - clean.double() / 255, norm)}
    largest = max((float(found.max()) for found in sizes.values() if len(found)), default=0.0)
    finite = all(bool(found.isfinite().all()) for found in sizes.values())
    lowest, highest = float(adversarial.min()), float(adversarial.max())
    allowed = _PIXEL * (1.0 if norm == "Linf" else clean[0].numel() ** 0.5)
    within = finite and largest <= eps + allowed and lowest >= 0 and highest <= 1
    found = (
        f"The largest of {sum(map(len, sizes.values()))} perturbations is {largest:.8g} ({norm}, eps {eps:.8g}); "
        f"pixels lie between {lowest:.8g} and {highest:.8g}."
    )
    return Check("perturbation", "Perturbations stay within eps and [0, 1]", within, found)


def _against_pgd(first: Tensor, white: Tensor, what: str, *, share: float = RESOLUTION) -> tuple[bool, str]:
    """Whether an attack is no stronger than PGD, from the images that stand under either; and the figures."""
    compared = Comparison.of(first, white)
    found = (
        f"Of {compared.images} images, {what} alone fools {compared.exceptions} and PGD alone {compared.others}; "
        f"{int(first.sum())} and {int(white.sum())} stand."
    )
    return compared.holds(share), found
