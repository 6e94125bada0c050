"""Training losses as pure functions of logits (B, C) and labels int64 (B,).

Each returns its terms as scalars by name, and their sum as `total`. They are computed in at least fp32, whatever the
precision of the networks' passes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2r_core.runtime import at_least_fp32

_SMOOTHING = 1e-5  # inside the first logarithm only, as published

# What a divergence is averaged over: all B x C elements as published, or the B images, which is C times as much.
DivergenceMean = Literal["elements", "images"]


def kl(p_logits: Tensor, q_logits: Tensor, mean: DivergenceMean = "elements") -> Tensor:
    """KL(p || q) as the D2R code computes it: p log(p + 1e-5) - p log q, averaged over all B x C elements.

    With `mean` "images" it is summed over the classes and averaged over the images, as TRADES does, so that its weight
    means the same for any number of classes.
    """
    p = p_logits.softmax(1)
    elements = p * torch.log(p + _SMOOTHING) - p * q_logits.log_softmax(1)
    return elements.mean() if mean == "elements" else elements.sum(1).mean()


def d2r(
    adv_logits: Tensor,
    clean_logits: Tensor,
    guidance_logits: Tensor,
    labels: Tensor,
    *,
    labelled_logits: Tensor | None = None,
    clean_weight: float = 20.0,
    adv_weight: float = 30.0,
    guidance_logit_weight: float = 0.0,
    divergence_mean: DivergenceMean = "elements",
    label_smoothing: float = 0.0,
    regularization: float = 1.0,
) -> dict[str, Tensor]:
    """The dual regularization loss of D2R (arXiv 2506.07056); nothing is detached, so the terms train both models.

    Args:
        adv_logits, clean_logits: of the target model, on the adversarial and the clean images, (B, C).
        guidance_logits: of the guidance model on the clean images, (B, C).
        labelled_logits: those that learn the labels, (B, C); by default the guidance's.
        guidance_logit_weight: of AdaGAT's term, by which the guidance alone follows the adversarial logits
            (arXiv 2508.17265); 0 as published, 2.5 in AdaGAT's code.
        regularization: factor on every term but the cross-entropy.

    Returns:
        The weighted terms. `ce`: cross-entropy of the guidance; `logit`: MSE between the adversarial logits and the
        guidance's; `clean` and `adv`: divergence of the target's clean and adversarial distribution from the
        guidance's; `guidance_logit`: AdaGAT's, where it has a weight.
    """
    a, n, t = at_least_fp32(adv_logits), at_least_fp32(clean_logits), at_least_fp32(guidance_logits)
    labelled = t if labelled_logits is None else at_least_fp32(labelled_logits)
    terms = {
        "ce": F.cross_entropy(labelled, labels, label_smoothing=label_smoothing),
        "logit": regularization * F.mse_loss(a, t),
        "clean": regularization * clean_weight * (kl(n, t, divergence_mean) - kl(t, n, divergence_mean)).abs(),
        "adv": regularization * adv_weight * kl(a, t, divergence_mean),
    }
    if guidance_logit_weight:
        terms["guidance_logit"] = regularization * guidance_logit_weight * F.mse_loss(a.detach(), t)
    return _with_total(**terms)


def lbgat(
    adv_logits: Tensor,
    clean_logits: Tensor,
    guidance_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    regularization: float = 1.0,
) -> dict[str, Tensor]:
    """Learnable boundary guided adversarial training (Cui et al. 2021), with TRADES' term weighted by `beta`.

    The logits and `regularization` are those of `d2r`.
    """
    a, n, t = at_least_fp32(adv_logits), at_least_fp32(clean_logits), at_least_fp32(guidance_logits)
    return _with_total(
        ce=F.cross_entropy(t, labels, label_smoothing=label_smoothing),
        logit=regularization * F.mse_loss(a, t),
        robust=regularization * beta * _batch_kl(n, a),
    )


def trades(
    adv_logits: Tensor,
    clean_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    regularization: float = 1.0,
) -> dict[str, Tensor]:
    """TRADES (Zhang et al. 2019): clean cross-entropy, and `beta` times KL(clean || adversarial).

    `regularization` is a factor on the second term.
    """
    a, n = at_least_fp32(adv_logits), at_least_fp32(clean_logits)
    return _with_total(
        ce=F.cross_entropy(n, labels, label_smoothing=label_smoothing),
        robust=regularization * beta * _batch_kl(n, a),
    )


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Adversarial training on adversarial images (Madry et al. 2018), standard training on clean ones."""
    return _with_total(ce=F.cross_entropy(at_least_fp32(logits), labels, label_smoothing=label_smoothing))


def _batch_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), summed over the classes and averaged over the batch, as in TRADES."""
    return F.kl_div(q_logits.log_softmax(1), p_logits.softmax(1), reduction="batchmean")


def _with_total(**terms: Tensor) -> dict[str, Tensor]:
    return {**terms, "total": torch.stack(list(terms.values())).sum()}
