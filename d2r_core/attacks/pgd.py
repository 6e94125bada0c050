"""White-box attacks: an attack is a loss, a start, a step and a projection.

Images are in [0, 1], (B, 3, H, W); `eps` is the radius in the same units. The model is attacked in eval mode with
its parameters frozen; modes are as before on return.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.attacks import norms
from d2r_core.attacks.norms import Norm
from d2r_core.runtime import at_least_fp32

Loss = Callable[[Tensor], Tensor]  # of the candidate images, to a scalar that the attack makes large


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


def ascend(loss: Loss, start: Tensor, x: Tensor, *, eps: float, step_size: float, steps: int) -> Tensor:
    """Sign-gradient ascent on `loss` from `start`, projected after each step on the eps-ball of x and on [0, 1]."""
    lower, upper = x - eps, x + eps
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():  # also for a caller under no_grad
            (gradient,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.clamp(torch.clamp(x_adv, lower, upper), 0.0, 1.0)
    return x_adv.detach().clamp(0.0, 1.0)


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
    loss: Literal["ce", "margin"] = "ce",
    noise: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent from a random start (Madry et al. 2018); with the margin loss, the CW attack.

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

    objective = _objective(loss)
    with under_attack(model):
        return ascend(
            lambda x_adv: objective(at_least_fp32(model(x_adv)), y), start, x, eps=eps, step_size=step_size, steps=steps
        )


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Callable[[int], Tensor],
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "Linf",
    loss: Literal["ce", "margin"] = "ce",
    restarts: int = 1,
) -> Tensor:
    """PGD as an evaluation runs it: an image falls at the first iterate that misleads, and is left alone from then on.

    The published evaluations ask the model about the last iterate alone; looking at all costs nothing and is never
    weaker. What has fallen (misclassified clean, or at any iterate of any restart) leaves the batch.

    Args:
        noise: restart number, from 0 -> uniform draw in [-1, 1] of x's shape.

    Returns:
        For each image the iterate that misled the model, x itself where it is wrong anyway, else the last iterate.
    """
    objective = _objective(loss)
    found = x.clone()
    with under_attack(model):
        with torch.no_grad():
            standing = (model(x).argmax(1) == y).nonzero().squeeze(1)
        for restart in range(restarts):
            if not len(standing):
                break
            clean, labels = x[standing], y[standing]
            x_adv = (clean + norms.start(noise(restart)[standing], eps, norm)).clamp(0.0, 1.0)
            for step in range(steps + 1):
                last = step == steps
                x_adv = x_adv.detach().requires_grad_(not last)
                with torch.set_grad_enabled(not last):
                    logits = at_least_fp32(model(x_adv))
                    gradient = x_adv if last else torch.autograd.grad(objective(logits, labels), x_adv)[0]
                x_adv = x_adv.detach()
                right = logits.argmax(1) == labels
                if last or not right.all():
                    found[standing] = x_adv
                    standing, clean, labels, x_adv, gradient = (
                        rows[right] for rows in (standing, clean, labels, x_adv, gradient)
                    )
                if last or not len(standing):
                    break
                delta = x_adv + norms.steepest(gradient, step_size, norm) - clean
                x_adv = (clean + norms.project(delta, eps, norm)).clamp(0.0, 1.0)
    return found


def _objective(loss: Literal["ce", "margin"]) -> Callable[[Tensor, Tensor], Tensor]:
    """What an attack makes large, of logits (B, C) and labels (B,): a scalar, the images' sum."""
    if loss == "ce":
        return lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")
    return lambda logits, labels: -margin(logits, labels).sum()
