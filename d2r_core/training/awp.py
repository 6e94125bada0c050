"""Adversarial weight perturbation (Wu et al. 2020): the gradient is taken at the worst weights nearby."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TINY = 1e-20  # avoids a division by zero when the gradient vanishes


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Inside the block, each weight of two or more dimensions is moved by gamma times its norm up the loss's gradient.

    One step, as published. It changes neither BatchNorm statistics nor `grad`, and after the block the weights are
    bitwise as before: compute the gradients inside the block and take the optimizer's step after it.

    Args:
        loss: the training loss of the current batch at the current weights of `model`.
        gamma: size of the move relative to each weight's norm; 0.005 as published for TRADES, 0.01 for AT.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "weight" in name and parameter.requires_grad
    ]
    originals = [weight.detach().clone() for weight in weights]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gamma * weight.norm() / (gradient.norm() + _TINY) * gradient)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, originals, strict=True):
                weight.copy_(value)
