"""The two balls that attacks stay in, Linf and L2: norm, random start, steepest step, projection.

Perturbations are (B, C, H, W), radii in the images' units.
"""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["Linf", "L2"]

_TINY = 1e-12


def norm(delta: Tensor, ball: Norm) -> Tensor:
    """The norm of each perturbation, (B,), in delta's own precision."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if ball == "Linf" else flat.square().sum(1).sqrt()


def random_start(noise: Tensor, eps: float, ball: Norm) -> Tensor:
    """A random perturbation from a uniform draw in [-1, 1]: uniform in the cube, or uniform in direction at `eps`."""
    return eps * noise if ball == "Linf" else eps * unit(normal(noise), ball)


def ascent_step(gradient: Tensor, length: float, ball: Norm) -> Tensor:
    """The step of that length along which the loss grows most."""
    return length * gradient.sign() if ball == "Linf" else length * unit(gradient, ball)


def project(delta: Tensor, eps: float, ball: Norm) -> Tensor:
    """The nearest perturbation within `eps`."""
    if ball == "Linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / norm(delta, ball).clamp_min(_TINY)).clamp_max(1.0)[:, None, None, None]


def unit(delta: Tensor, ball: Norm) -> Tensor:
    """Each perturbation scaled to norm 1; one of norm 0 stays 0."""
    return delta / norm(delta, ball).clamp_min(_TINY)[:, None, None, None]


def normal(noise: Tensor) -> Tensor:
    """A uniform draw in [-1, 1] as a standard normal one, whose direction is uniform on the sphere."""
    return torch.erfinv(noise.clamp(-1 + 1e-7, 1 - 1e-7)) * 2**0.5
