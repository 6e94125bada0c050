"""White-box attacks: an attack is a loss, a start, a step and a projection.

One loop, `ascend`, serves all of them: CAG and the published `pgd` in training, `PGD` and its settings (`fgsm`, `cw`)
in the evaluation. Images are in [0, 1], (B, 3, H, W); `eps` is the radius in the same units. The model is attacked in
eval mode with its parameters frozen; modes are as before on return.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.attacks import norms
from d2r_core.attacks.norms import Norm
from d2r_core.runtime import at_least_fp32

LossName = Literal["ce", "margin"]  # cross-entropy, or the margin loss of Carlini & Wagner (2017)
# (logits (B, C), what they are compared with (B, ...)) -> what an attack makes large: a scalar, the images' sum
Loss = Callable[[Tensor, Tensor], Tensor]
# (iterate, the loss's gradient there, clean images) -> the next iterate, projected
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
# Restart number, from 0 -> uniform draw in [-1, 1] of the batch's shape
Noise = Callable[[int], Tensor]


@contextmanager
def under_attack(*models: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside the block; every module's mode and every flag restored after it.

    Frozen, because the attack needs the gradient of the images alone.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def ascend(
    model: nn.Module,
    loss: Loss,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    step: Step,
    steps: int,
    any_iterate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient ascent on loss(model(x_adv), y) from `start`.

    Args:
        x, y: clean images (B, 3, H, W) and what the loss compares the logits with, (B, ...); the labels (B,) if
            `any_iterate`.
        any_iterate: an image leaves the batch with the first iterate that the model misclassifies. Otherwise the last
            iterate alone counts, and nothing here waits for the device.

    Returns:
        For each image the iterate that the model misclassifies, else the last one; and which images are left in the
        batch, int64: all, or with `any_iterate` those that no iterate misleads.
    """
    x_adv, result = start, torch.empty_like(start)
    rows = torch.arange(len(x), device=x.device)  # of the images in the batch
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():  # also for a caller under no_grad
            logits = at_least_fp32(model(x_adv))
            gradient = input_gradient(loss(logits, y), x_adv)
        x_adv = x_adv.detach()
        if any_iterate and not (robust := logits.argmax(1) == y).all():
            result[rows] = x_adv
            rows, x, y, x_adv, gradient = (part[robust] for part in (rows, x, y, x_adv, gradient))
            if not len(rows):
                return result, rows
        x_adv = step(x_adv, gradient, x)
    x_adv = x_adv.detach().clamp(0.0, 1.0)  # of no effect but on a start without steps
    result[rows] = x_adv
    if any_iterate:
        rows = rows[_correct(model, x_adv, y)]
    return result, rows


def input_gradient(loss: Tensor, x: Tensor) -> Tensor:
    """The gradient of a scalar with respect to x: zero where autograd cannot follow how it depends on x."""
    if not loss.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(loss, x, materialize_grads=True)
    return gradient


def published_step(eps: float, step_size: float) -> Step:
    """Along the gradient's sign, then back into the Linf ball and [0, 1]: rounded as the published code rounds."""

    def step(x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        x_adv = x_adv + step_size * gradient.sign()
        return torch.clamp(torch.clamp(x_adv, x - eps, x + eps), 0.0, 1.0)

    return step


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the best other one, (B,): positive where the model is right (Carlini & Wagner 2017)."""
    label = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return label - others.amax(1)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    loss: LossName = "ce",
    noise: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent from a random start, as published (Madry et al. 2018): the last iterate, in Linf.

    Args:
        x, y: images (B, 3, H, W) in [0, 1] and labels (B,).
        loss: "ce" (cross-entropy) or "margin" (Carlini & Wagner's, in PGD's loop).
        noise: uniform draw in [-1, 1] of x's shape, times eps the start; drawn if None.

    Returns:
        Adversarial images of x's shape, within eps of x and in [0, 1].
    """
    if noise is None:
        noise = torch.empty_like(x).uniform_(-1.0, 1.0)
    start = torch.clamp(x + eps * noise, 0.0, 1.0)
    with under_attack(model):
        return ascend(model, _LOSSES[loss], start, x, y, step=published_step(eps, step_size), steps=steps)[0]


@dataclass(frozen=True)
class Clean:
    """No attack; described as PGD is."""

    name: str = "clean"
    eps: float = 0.0
    step_size: float = 0.0
    steps: int = 0
    restarts: int = 0
    passes: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD as an evaluation runs it: any iterate counts, and an image is left alone once it is misclassified.

    The published evaluations ask the model about the last iterate alone; looking at all costs nothing and is never
    weaker. What is misclassified (clean, or at any iterate of any restart) leaves the batch.
    """

    eps: float
    step_size: float
    steps: int
    norm: Norm = "Linf"
    restarts: int = 1
    loss: LossName = "ce"
    random_start: bool = True
    any_iterate: bool = True  # if False: all steps for every image, whatever the model says on the way

    def __post_init__(self) -> None:
        assert self.any_iterate or self.restarts == 1, "of several last iterates none is the result"

    @property
    def name(self) -> str:
        """As papers call it: "PGD-20", "CW-20" or "FGSM"."""
        if self.steps == 1 and not self.random_start:
            return "FGSM"
        return f"{'PGD' if self.loss == 'ce' else 'CW'}-{self.steps}"

    @property
    def passes(self) -> int:
        """Forward and backward passes of an image that stays robust to the end, run_attack's own included."""
        return 2 + self.restarts * (2 * self.steps + 1) if self.any_iterate else 2 * self.steps + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """For each image the iterate that misleads the model, x itself where it is wrong anyway, else the last one."""
        with under_attack(model):
            if not self.any_iterate:
                return self._restart(model, x, y, noise(0))[0]
            x_adv = x.clone()
            robust = _correct(model, x, y)
            for restart in range(self.restarts):
                if not len(robust):
                    break
                images, rows = self._restart(model, x[robust], y[robust], noise(restart)[robust])
                x_adv[robust] = images
                robust = robust[rows]
        return x_adv

    def _restart(self, model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """All steps from one start; see ascend."""

        def step(x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
            delta = x_adv + norms.ascent_step(gradient, self.step_size, self.norm) - x
            return (x + norms.project(delta, self.eps, self.norm)).clamp(0.0, 1.0)

        start = (x + norms.random_start(noise, self.eps, self.norm)).clamp(0.0, 1.0) if self.random_start else x
        loss = _LOSSES[self.loss]
        return ascend(model, loss, start, x, y, step=step, steps=self.steps, any_iterate=self.any_iterate)


def fgsm(eps: float, norm: Norm = "Linf") -> PGD:
    """One step of length eps from the clean image (Goodfellow et al. 2015)."""
    return PGD(eps=eps, step_size=eps, steps=1, norm=norm, random_start=False)


def cw(*, eps: float, step_size: float, steps: int, norm: Norm = "Linf", restarts: int = 1) -> PGD:
    """The margin loss of Carlini & Wagner (2017) in PGD's loop."""
    return PGD(eps=eps, step_size=step_size, steps=steps, norm=norm, restarts=restarts, loss="margin")


def _correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model classifies correctly, int64."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).nonzero().squeeze(1)


_LOSSES: dict[LossName, Loss] = {
    "ce": lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"),
    "margin": lambda logits, labels: -margin(logits, labels).sum(),
}
