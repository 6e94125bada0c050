"""Training methods as modules: the models inside, one batch in, the loss (`total`), its terms and accuracies out.

Each knows its attack (`perturb`) and its loss (`forward`); the training loop and DDP need no more of it. `model` is
what is being trained for use, `guidance` helps and is thrown away.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from d2r_core.attacks import cag, pgd
from d2r_core.training import losses


class Attack(TypedDict):
    """Linf radius and step in the images' units, and the number of steps."""

    eps: float
    step_size: float
    steps: int


class Standard(nn.Module):
    """Cross-entropy on clean images: how the guidance model is pretrained."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """No attack: the clean images."""
        return x

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.model(x_adv)
        return losses.cross_entropy(logits, y, label_smoothing=self.label_smoothing) | {
            "batch_accuracy": _accuracy(logits, y)
        }


class AdversarialTraining(Standard):
    """Cross-entropy on PGD's examples from a uniform start (Madry et al. 2018)."""

    def __init__(self, model: nn.Module, *, attack: Attack, label_smoothing: float = 0.0) -> None:
        super().__init__(model, label_smoothing=label_smoothing)
        self.attack = attack

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
        return pgd(self.model, x, y, noise=noise, **self.attack)


class Trades(nn.Module):
    """TRADES (Zhang et al. 2019): the attack and the loss look at the target's own clean distribution."""

    def __init__(self, model: nn.Module, *, attack: Attack, beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.attack = attack
        self.settings = {"beta": beta, "label_smoothing": label_smoothing}

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return cag.generate(self.model, self.model, x, noise=_normal(x, generator), **self.attack)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        clean_logits = self.model(x)
        adv_logits = self.model(x_adv)
        return losses.trades(adv_logits, clean_logits, y, **self.settings) | _accuracies(clean_logits, adv_logits, y)


class Lbgat(nn.Module):
    """LBGAT (Cui et al. 2021): TRADES' attack; the guidance's logits are the adversarial ones' aim."""

    def __init__(
        self,
        model: nn.Module,
        guidance: nn.Module,
        *,
        attack: Attack,
        beta: float,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.guidance = guidance
        self.attack = attack
        self.settings = {"beta": beta, "label_smoothing": label_smoothing}

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return cag.generate(self.model, self.model, x, noise=_normal(x, generator), **self.attack)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        adv_logits = self.model(x_adv)
        clean_logits = self.model(x)
        terms = losses.lbgat(adv_logits, clean_logits, self.guidance(x), y, **self.settings)
        return terms | _accuracies(clean_logits, adv_logits, y)


class D2R(nn.Module):
    """D2R loss on CAG's adversarial examples; trains target and guidance model together (arXiv 2506.07056).

    With `freeze_guidance` (not published) the guidance stays as pretrained, in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        guidance: nn.Module,
        *,
        attack: Attack,
        clean_weight: float,
        adv_weight: float,
        label_smoothing: float = 0.0,
        freeze_guidance: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.guidance = guidance
        self.attack = attack
        self.settings = {"clean_weight": clean_weight, "adv_weight": adv_weight, "label_smoothing": label_smoothing}
        self.freeze_guidance = freeze_guidance
        if freeze_guidance:
            guidance.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "D2R":
        super().train(mode)
        if self.freeze_guidance:
            self.guidance.eval()
        return self

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """CAG's images for the clean ones x, (B, 3, H, W); `generator` draws the start's noise."""
        return cag.generate(self.model, self.guidance, x, noise=_normal(x, generator), **self.attack)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        # Three passes in the published order: the target's BatchNorm sees the adversarial batch first, then the clean.
        adv_logits = self.model(x_adv)
        clean_logits = self.model(x)
        terms = losses.d2r(adv_logits, clean_logits, self.guidance(x), y, **self.settings)
        return terms | _accuracies(clean_logits, adv_logits, y)


Objective = Standard | Trades | Lbgat | D2R  # AdversarialTraining is a Standard with an attack


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x).normal_(generator=generator)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean().detach()


def _accuracies(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "batch_clean_accuracy": _accuracy(clean_logits, labels),
        "batch_robust_accuracy": _accuracy(adv_logits, labels),
    }
