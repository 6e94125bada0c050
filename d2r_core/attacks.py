"""White-box attacks: an attack is a loss, a start, a step and a projection.

Images are in [0, 1], (B, 3, H, W); `eps` is the Linf radius in the same units. The model is attacked in eval mode with
its parameters frozen; modes are as before on return.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.losses import full

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

    def objective(x_adv: Tensor) -> Tensor:
        logits = full(model(x_adv))
        return F.cross_entropy(logits, y, reduction="sum") if loss == "ce" else -margin(logits, y).sum()

    with under_attack(model):
        return ascend(objective, start, x, eps=eps, step_size=step_size, steps=steps)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of length eps from the clean image."""
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, noise=torch.zeros_like(x))
