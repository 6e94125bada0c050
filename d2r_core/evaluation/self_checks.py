"""Does the evaluation deserve trust? Checks after Carlini et al. 2019 (section 5), Athalye et al. 2018, and AutoAttack.

A model that hides its gradients looks robust to the attacks that need them. Each check asks for something that holds
wherever they work, and fails where they do not. docs/evaluation.md explains each under its key.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2r_core import runtime
from d2r_core.attacks import norms
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import under_attack
from d2r_core.attacks.run import Attack, accuracy, run_attack
from d2r_core.data import Split
from d2r_core.evaluation import probes
from d2r_core.evaluation.curves import EpsCurve, StepsCurve
from d2r_core.evaluation.statistics import RESOLUTION, Comparison
from d2r_core.runtime import Precision

_EXPECTATIONS = {
    "more_steps": "More steps are never weaker",
    "large_eps": "A large eps fools every image",
    "black_box": "White box is at least as strong as black box",
    "transfer": "White box is at least as strong as transfer",
    "losses": "The cross-entropy is about as strong as the margin loss",
    "gradients": "Gradients are neither zero nor NaN",
    "noise": "Random noise is almost harmless",
    "logits": "The outputs are logits",
    "eval_mode": "The model is in eval mode and deterministic",
    "perturbation": "Perturbations stay within eps and [0, 1]",
}
SELF_CHECKS: tuple[str, ...] = tuple(_EXPECTATIONS)  # the keys, in the order of run_self_checks

_ROUNDING: Mapping[Precision, float] = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # of the largest logit
_PIXEL = 1e-6  # what fp32 may add to a pixel's distance, with room to spare
_LOSSES = 0.1  # the share of the images by which one loss may beat the other; see losses
_QUARTER = 0.25  # of eps; see noise


class SelfCheck(NamedTuple):
    """A check's result; `name` is what is expected."""

    key: str
    name: str
    passed: bool | None  # None: skipped
    detail: str  # one sentence with the figures, or why it was skipped


def run_self_checks(
    model: nn.Module,
    split: Split,
    config: EvaluationConfig,
    *,
    eps_curve: EpsCurve,
    steps_curve: StepsCurve,
    distances: Mapping[str, Tensor],
    saved: tuple[Tensor, Tensor],
    other: tuple[str, nn.Module] | None = None,
    black_box_attack: Attack | None = None,
    image_ids: Tensor | None = None,
) -> list[SelfCheck]:
    """All self-checks of `model`, on the images of its two curves.

    Args:
        eps_curve, steps_curve: of this model on `split`; see curves.
        distances: by attack, the perturbations' norms as recorded, float64 (N,) of whatever images.
        saved: clean images (G, 3, H, W), uint8 or float, and their adversarial ones float32, as recorded.
        other: what another model is called, and the model: its adversarial images must not fool this one better.
        black_box_attack: one at config.eps that uses no gradients (AutoAttack's Square).
        image_ids: as run_attack takes them.

    Under torchrun every process calls it alike and gets all checks.
    """
    image_ids = torch.arange(len(split)) if image_ids is None else image_ids
    clean, white_box = eps_curve.robust(0.0), eps_curve.robust(config.eps)

    def robust(key: str, attack: Attack) -> Tensor:
        """The images that are right clean and under `attack`."""
        result = run_attack(model, split, attack, config.cached_in(key), image_ids=image_ids)
        return result.correct(split.labels.cpu()) & clean

    before = probes.state(model)
    with under_attack(model), runtime.autocast(config.device, config.precision):
        training = any(module.training for module in model.modules())
        sizes = (config.batch_size, max(1, min(config.batch_size, len(split)) // 2))
        outputs, outputs_again = (probes.logits(model, split, size, config.device) for size in sizes)
        gradient_sizes = probes.gradient_sizes(model, split, config, image_ids)
        has_gradient = probes.has_gradient(model, split, config.device)
    pgd = replace(config.pgd, restarts=1)
    queried = robust("black_box", black_box_attack) if black_box_attack else None
    transferred = robust("transfer", probes.Transfer(other[1], replace(pgd, any_iterate=False))) if other else None
    noisy = robust("noise", probes.RandomStep(config.eps, config.norm))
    margin = robust("margin", replace(pgd, loss="margin"))
    after = probes.state(model)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return [
        more_steps(steps_curve, clean),
        large_eps(eps_curve),
        black_box(queried, white_box),
        transfer(transferred, white_box, other[0] if other else ""),
        losses(margin, white_box),
        gradients(gradient_sizes[:, clean], has_gradient=has_gradient),
        noise(noisy, eps_curve.robust(_QUARTER * config.eps), clean, config.eps),
        logits(outputs),
        eval_mode(outputs, outputs_again, training=training, changed=changed, precision=config.precision),
        perturbation(distances, saved, config.eps, config.norm),
    ]


def _result(key: str, passed: bool | None, detail: str) -> SelfCheck:
    return SelfCheck(key, _EXPECTATIONS[key], passed, detail)


def more_steps(curve: StepsCurve, clean: Tensor) -> SelfCheck:
    """No longer run of PGD may be weaker than a shorter one."""
    runs = curve.robust & clean
    steps = [point["steps"] for point in curve.points]
    compared = {
        (fewer, more): Comparison.of(runs[first], runs[second])
        for (first, fewer), (second, more) in combinations(enumerate(steps), 2)
    }
    (fewer, more), worst = min(compared.items(), key=lambda item: (item[1].holds(), item[1].chance))
    accuracies = ", ".join(f"{count}: {accuracy(run):.1%}" for count, run in zip(steps, runs, strict=True))
    detail = f"Accuracy by number of steps is {accuracies}"
    if not worst.holds():
        detail += f"; {fewer} steps fool {worst.exceptions} images that {more} do not, and {worst.others} the other way"
    return _result("more_steps", worst.holds(), f"{detail}.")


def large_eps(curve: EpsCurve) -> SelfCheck:
    """A ball that holds every image holds one of another class: no image may be robust."""
    last = curve.points[-1]
    detail = f"At eps {last['eps']:.4g}, {last['correct']} of {last['images']} images are robust."
    return _result("large_eps", last["correct"] == 0, detail)


def black_box(queried: Tensor | None, white_box: Tensor) -> SelfCheck:
    """An attack that does not see the gradients must be no stronger than PGD, which does."""
    if queried is None:
        return _result("black_box", None, "There was no black-box attack.")
    return _result("black_box", *_against_pgd(queried, white_box, "the black box"))


def transfer(transferred: Tensor | None, white_box: Tensor, other: str) -> SelfCheck:
    """Nor must what fools another model."""
    if transferred is None:
        return _result("transfer", None, "There was no other model.")
    return _result("transfer", *_against_pgd(transferred, white_box, f"what fools the {other}"))


def losses(margin: Tensor, white_box: Tensor) -> SelfCheck:
    """PGD on the cross-entropy must find about what it finds on the margin, however the logits are scaled or bent."""
    return _result("losses", *_against_pgd(margin, white_box, "the margin loss", share=_LOSSES))


def gradients(sizes: Tensor, *, has_gradient: bool = True) -> SelfCheck:
    """PGD is blind where the loss has no gradient.

    Args:
        sizes: the largest component of the gradient of each image that the model gets right, at two points, (2, N).
        has_gradient: whether autograd can follow how the outputs depend on the images.
    """
    if not has_gradient:
        return _result(
            "gradients",
            False,
            "The outputs do not depend on the images in a way that autograd can follow (detach, no_grad, argmax, or "
            "another library's arithmetic): FGSM, PGD, CW, APGD and FAB see a gradient of zero.",
        )
    images = sizes.shape[1]
    if not images:
        return _result("gradients", None, "The model gets no image right, so there is nothing to attack.")
    broken = int((~sizes.isfinite()).any(0).sum())
    blind = int((sizes == 0).any(0).sum())
    detail = f"Of {images} images, the loss has a zero gradient at {blind}, and one that is not finite at {broken}."
    return _result("gradients", not broken and blind <= RESOLUTION * images, detail)


def noise(noisy: Tensor, quarter: Tensor, clean: Tensor, eps: float) -> SelfCheck:
    """A random step of length eps must be no stronger than PGD at a quarter of it.

    In D dimensions, on a boundary that is flat at this scale, noise is as harmful as an attack of about eps / sqrt(D)
    (Fawzi et al. 2016): two of its standard deviations are a sixth of eps at 8 x 8 pixels, a 20th at 32 x 32.
    """
    right = int(clean.sum())
    detail = (
        f"Of {right} images, random noise of size {eps:.4g} fools {right - int(noisy.sum())}, "
        f"PGD at a quarter of it {right - int(quarter.sum())}."
    )
    return _result("noise", Comparison.of(noisy, quarter).holds(), detail)


def logits(outputs: Tensor) -> SelfCheck:
    """Losses expect logits: of probabilities, or of logarithms that were saturated, their gradients vanish.

    Args:
        outputs: of the model, float32 (N, C).
    """
    images = len(outputs)
    lowest, highest = float(outputs.min()), float(outputs.max())
    broken = int((~outputs.isfinite()).any(1).sum())
    certain = int((outputs.amax(1) == 0).sum())
    normalised = bool((outputs.logsumexp(1).abs() < 1e-3).all())
    passed, detail = False, f"The outputs lie between {lowest:.3g} and {highest:.3g}"
    if broken:
        detail = f"The outputs of {broken} of {images} images are not finite"
    elif lowest >= 0 and highest <= 1:
        detail += f": {'probabilities' if ((outputs.sum(1) - 1).abs() < 1e-3).all() else 'not the range of logits'}"
    elif normalised and certain:
        detail += f": logarithms of probabilities, rounded to 1 for {certain} of {images} images"
    else:
        passed = True
    return _result("logits", passed, f"{detail}.")


def eval_mode(
    outputs: Tensor, outputs_again: Tensor, *, training: bool, changed: list[str], precision: Precision
) -> SelfCheck:
    """Dropout, noise and BatchNorm's batch statistics make a moving target; random outputs are no robustness.

    Args:
        outputs, outputs_again: on the same images in two batch sizes, float32 (N, C).
        training: whether any module is in training mode.
        changed: parameters and buffers that the attacks changed.
    """
    moved = float((outputs - outputs_again).abs().max() / outputs.abs().max().clamp_min(1e-30))
    detail = f"Asked twice in other batches, the outputs differ by {moved:.1g} of the largest one"
    if training:
        detail += "; a module is in training mode"
    if changed:
        detail += f"; the attacks changed {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}"
    return _result("eval_mode", moved <= _ROUNDING[precision] and not training and not changed, f"{detail}.")


def perturbation(distances: Mapping[str, Tensor], saved: tuple[Tensor, Tensor], eps: float, norm: Norm) -> SelfCheck:
    """What was recorded must lie within eps and [0, 1], measured in fp64."""
    clean, adversarial = (images.cpu() for images in saved)
    x = clean.double() / 255 if clean.dtype == torch.uint8 else clean.double()
    sizes = {**distances, "saved": norms.norm(adversarial.double() - x, norm)}
    largest = max((float(column.max()) for column in sizes.values() if len(column)), default=0.0)
    finite = all(bool(column.isfinite().all()) for column in sizes.values())
    lowest, highest = float(adversarial.min()), float(adversarial.max())
    allowed = _PIXEL * (1.0 if norm == "Linf" else clean[0].numel() ** 0.5)
    detail = (
        f"The largest of {sum(map(len, sizes.values()))} perturbations is {largest:.8g} ({norm}, eps {eps:.8g}); "
        f"pixels lie between {lowest:.8g} and {highest:.8g}."
    )
    return _result("perturbation", finite and largest <= eps + allowed and lowest >= 0 and highest <= 1, detail)


def _against_pgd(first: Tensor, white_box: Tensor, what: str, *, share: float = RESOLUTION) -> tuple[bool, str]:
    """Whether an attack is no stronger than PGD, from the images that are robust to either; and the figures."""
    compared = Comparison.of(first, white_box)
    detail = (
        f"Of {compared.images} images, {what} alone fools {compared.exceptions} and PGD alone {compared.others}; "
        f"{int(first.sum())} and {int(white_box.sum())} are robust."
    )
    return compared.holds(share), detail
