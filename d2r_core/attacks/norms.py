"""The two balls that attacks stay in, Linf and L2: size, random point, steepest step, projection.

Perturbations are (B, C, H, W), radii in the images' units.
"""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["Linf", "L2"]

_TINY = 1e-12


def size(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each perturbation, (B,), in delta's own precision."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.square().sum(1).sqrt()


def start(noise: Tensor, eps: float, norm: Norm) -> Tensor:
    """A random perturbation from a uniform draw in [-1, 1]: uniform in the cube, or uniform in direction at `eps`."""
    return eps * noise if norm == "Linf" else eps * unit(normal(noise), norm)


def steepest(gradient: Tensor, length: float, norm: Norm) -> Tensor:
    """The step of that length along which the loss grows most."""
    return length * gradient.sign() if norm == "Linf" else length * unit(gradient, norm)


def project(delta: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest perturbation within `eps`."""
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / size(delta, norm).clamp_min(_TINY)).clamp_max(1.0)[:, None, None, None]


def unit(delta: Tensor, norm: Norm) -> Tensor:
    """Each perturbation scaled to size 1; one of size 0 stays."""
    return delta / size(delta, norm).clamp_min(_TINY)[:, None, None, None]


def normal(noise: Tensor) -> Tensor:
    """A uniform draw in [-1, 1] as a standard normal one, whose direction is uniform on the sphere."""
    return torch.erfinv(noise.clamp(-1 + 1e-7, 1 - 1e-7)) * 2**0.5
