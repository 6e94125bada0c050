"""Collaborative adversarial generation (arXiv 2506.07056): the guidance model says where the target must not go."""

import torch
from torch import Tensor, nn

from d2r_core.attacks.pgd import ascend, published_step, under_attack
from d2r_core.runtime import at_least_fp32

_START_SCALE = 0.001  # of the normal noise at the start, as published


def generate(
    target: nn.Module,
    guidance: nn.Module,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    noise: Tensor | None = None,
) -> Tensor:
    """Images near x on which the target's distribution is far from the guidance model's on x.

    Each step ascends the divergence KL(p_guidance(x) || p_target(x')). The guidance's distribution does not depend on
    x', so it is computed once.

    Args:
        target, guidance: images -> logits (B, C); attacked in eval mode, their modes are restored.
        x: clean images (B, 3, H, W) in [0, 1].
        eps, step_size: Linf radius and step, in the images' units; 0.031 and 0.007 as published, with 10 `steps`.
        noise: standard normal draw of x's shape for the start; drawn if None.

    Returns:
        Adversarial images of x's shape, within eps of x and in [0, 1].
    """
    if noise is None:
        noise = torch.randn_like(x)
    start = x + _START_SCALE * noise
    with under_attack(target, guidance):
        with torch.no_grad():
            guidance_distribution = at_least_fp32(guidance(x)).softmax(1)
        step = published_step(eps, step_size)
        return ascend(target, _divergence, start, x, guidance_distribution, step=step, steps=steps)[0]


def _divergence(logits: Tensor, guidance_distribution: Tensor) -> Tensor:
    """KL(guidance || target) but for its term guidance * log(guidance + 1e-5), which is constant in the logits."""
    return -(guidance_distribution * logits.log_softmax(1)).sum()
