"""Training methods as modules: the models inside, one batch in, the loss (`total`), its terms and accuracies out."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core import cag, losses


class Standard(nn.Module):
    """Cross-entropy on clean images: how the guidance model is pretrained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def perturb(self, x: Tensor, noise: Tensor) -> Tensor:
        """No attack: the clean images."""
        return x

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.model(x_adv)
        return {"total": F.cross_entropy(logits, y), "batch_accuracy": _accuracy(logits, y)}


class D2R(nn.Module):
    """D2R loss on CAG's adversarial examples; trains target and guidance model together (arXiv 2506.07056)."""

    def __init__(
        self,
        target: nn.Module,
        guidance: nn.Module,
        *,
        eps: float,
        step_size: float,
        steps: int,
        clean_weight: float,
        adv_weight: float,
    ) -> None:
        super().__init__()
        self.model = target
        self.guidance = guidance
        self.attack = {"eps": eps, "step_size": step_size}
        self.steps = steps
        self.weights = {"clean_weight": clean_weight, "adv_weight": adv_weight}

    def perturb(self, x: Tensor, noise: Tensor) -> Tensor:
        """Adversarial images for the clean ones x from a standard normal draw `noise`, both (B, 3, H, W)."""
        return cag.generate(self.model, self.guidance, x, steps=self.steps, noise=noise, **self.attack)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        # Three passes in the published order: the target's BatchNorm sees the adversarial batch first, then the clean.
        adv_logits = self.model(x_adv)
        clean_logits = self.model(x)
        guidance_logits = self.guidance(x)
        terms = losses.d2r(adv_logits, clean_logits, guidance_logits, y, **self.weights)
        accuracies = {
            "batch_clean_accuracy": _accuracy(clean_logits, y),
            "batch_robust_accuracy": _accuracy(adv_logits, y),
        }
        return {**terms, **accuracies}


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).to(logits.dtype).mean().detach()
