"""Adversarial weight perturbation (Wu et al. 2020): the update is taken where the weights are at their worst nearby."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TINY = 1e-20  # keeps a vanished gradient from becoming NaN


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Inside the block each weight of two or more dimensions is moved by gamma times its norm up the loss's gradient.

    One step, as published. The search touches neither BatchNorm statistics nor gradients, and afterwards the weights
    are bitwise what they were: take the gradients inside the block, the optimizer's step after it.

    Args:
        loss: the training loss of the present batch, a function of `model`'s present weights.
        gamma: size of the move relative to each weight's norm; 0.005 as published for TRADES and 0.01 for AT.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "weight" in name and parameter.requires_grad
    ]
    before = [weight.detach().clone() for weight in weights]
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
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
