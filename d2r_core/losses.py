"""Training losses as pure functions of logits (B, C) and labels (B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTHING = 1e-5  # inside the first logarithm only, as published


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) as the D2R code computes it: the mean over all B x C elements of p log(p + 1e-5) - p log q."""
    p = p_logits.softmax(1)
    return (p * torch.log(p + _SMOOTHING) - p * q_logits.log_softmax(1)).mean()


def d2r(
    adv_logits: Tensor,
    clean_logits: Tensor,
    guidance_logits: Tensor,
    labels: Tensor,
    *,
    clean_weight: float = 20.0,
    adv_weight: float = 30.0,
) -> dict[str, Tensor]:
    """The dual regularization loss (arXiv 2506.07056); nothing is detached, every term trains both models.

    Args:
        adv_logits, clean_logits: of the target, on the adversarial and the clean images, (B, C).
        guidance_logits: of the guidance model on the clean images, (B, C).

    Returns:
        Scalars: the terms as they enter the sum, and the sum as `total`. `ce`: the guidance learns the labels;
        `logit`: adversarial logits follow the guidance's (MSE); `clean` and `adv`: the weighted divergences of the
        clean and of the adversarial distribution from the guidance's.
    """
    terms = {
        "ce": F.cross_entropy(guidance_logits, labels),
        "logit": F.mse_loss(adv_logits, guidance_logits),
        "clean": clean_weight * (kl(clean_logits, guidance_logits) - kl(guidance_logits, clean_logits)).abs(),
        "adv": adv_weight * kl(adv_logits, guidance_logits),
    }
    return {**terms, "total": sum(terms.values(), start=torch.zeros_like(terms["ce"]))}
