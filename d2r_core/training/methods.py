"""Training methods as modules that hold their models.

Each has an attack (`perturb`) and a loss (`forward`, from a batch to the loss `total`, its terms and the batch's
accuracies); the training loop and DDP use nothing else. `model` is the target, the model that is trained for use;
`guidance` only helps to train it.
"""

import copy
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from d2r_core.attacks import cag, pgd
from d2r_core.training import losses
from d2r_core.training.config import WarmUp
from d2r_core.training.losses import DivergenceMean

# How the guidance model learns: with the target, by every term (as published); not at all; on the adversarial images,
# while the target's terms do not move it (PeerAiD); or as a moving average of the target (ADR).
GuidanceTraining = Literal["joint", "frozen", "adversarial", "ema"]
# What a training attack moves away from: the guidance's distribution on the clean images (CAG, as published), the
# target's own (TRADES), or the label (PGD).
AttackName = Literal["cag", "trades", "pgd"]

_EMA_DECAY = 0.995  # of "ema", per step, as in ADR


class AttackParameters(TypedDict):
    """Of an Linf attack: radius and step size in the images' units, and the number of steps."""

    eps: float
    step_size: float
    steps: int


class TrainingMethod(nn.Module):
    """What the training loop knows of a method; without an attack, `perturb` returns the clean images."""

    def __init__(self, model: nn.Module, attack: AttackParameters | None = None) -> None:
        super().__init__()
        self.model = model
        self.attack = attack
        self.eps_factor = self.regularization = 1.0  # of the current step, by the warm-up

    def begin_step(self, warm_up: WarmUp, epochs: float) -> None:
        """Called before each step of the training, of which so many epochs are complete."""
        self.eps_factor = warm_up.eps_factor(epochs)
        self.regularization = warm_up.regularization_factor(epochs)

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Adversarial images for x, (B, 3, H, W) in [0, 1]; `generator` draws the start."""
        return x

    def _pgd(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
        return pgd(self.model, x, y, noise=noise, **self._current_attack())

    def _cag(self, guidance: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(x).normal_(generator=generator)
        return cag.generate(self.model, guidance, x, noise=noise, **self._current_attack())

    def _current_attack(self) -> AttackParameters:
        """The attack of the current step: in a warm-up of eps the same in a smaller ball."""
        assert self.attack is not None
        return {
            "eps": self.attack["eps"] * self.eps_factor,
            "step_size": self.attack["step_size"] * self.eps_factor,
            "steps": self.attack["steps"],
        }


class Standard(TrainingMethod):
    """Cross-entropy on clean images; pretrains the guidance model."""

    def __init__(
        self, model: nn.Module, *, attack: AttackParameters | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model, attack)
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.model(x_adv)
        return losses.cross_entropy(logits, y, label_smoothing=self.label_smoothing) | {
            "batch_accuracy": _accuracy(logits, y)
        }


class AdversarialTraining(Standard):
    """Cross-entropy on PGD's examples, from a uniform random start (Madry et al. 2018)."""

    def __init__(self, model: nn.Module, *, attack: AttackParameters, label_smoothing: float = 0.0) -> None:
        super().__init__(model, attack=attack, label_smoothing=label_smoothing)

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self._pgd(x, y, generator)


class Trades(TrainingMethod):
    """TRADES (Zhang et al. 2019): attack and loss compare with the target's own distribution on the clean images."""

    def __init__(
        self, model: nn.Module, *, attack: AttackParameters, beta: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model, attack)
        self.loss_parameters = {"beta": beta, "label_smoothing": label_smoothing}

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self._cag(self.model, x, generator)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        clean_logits = self.model(x)
        adv_logits = self.model(x_adv)
        terms = losses.trades(adv_logits, clean_logits, y, regularization=self.regularization, **self.loss_parameters)
        return terms | _accuracies(clean_logits, adv_logits, y)


class Lbgat(TrainingMethod):
    """LBGAT (Cui et al. 2021): TRADES' attack; the adversarial logits are fitted to the guidance's."""

    def __init__(
        self,
        model: nn.Module,
        guidance: nn.Module,
        *,
        attack: AttackParameters,
        beta: float,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, attack)
        self.guidance = guidance
        self.loss_parameters = {"beta": beta, "label_smoothing": label_smoothing}

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self._cag(self.model, x, generator)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        adv_logits = self.model(x_adv)
        clean_logits = self.model(x)
        terms = losses.lbgat(
            adv_logits,
            clean_logits,
            self.guidance(x),
            y,
            regularization=self.regularization,
            **self.loss_parameters,
        )
        return terms | _accuracies(clean_logits, adv_logits, y)


class D2R(TrainingMethod):
    """The D2R loss on CAG's adversarial examples; trains target and guidance model together (arXiv 2506.07056).

    Everything with a default is as published. docs/method.md describes the options and their sources.

    Args:
        guidance_training: "frozen": the guidance remains as it is, in eval mode. "adversarial": it learns the labels
            of the adversarial images, its logits there take the place of those on the clean ones, and they are
            detached in all terms but the cross-entropy (Jung et al. 2024). "ema": in place of `guidance`, an average
            of the target's states (decay 0.995 per step; Wu et al. 2024), in eval mode; the target itself learns the
            labels then, on the clean images. The first 200 steps count equally (Tarvainen & Valpola 2017), so that
            the average forgets the random start.
        loss_options: further parameters of `losses.d2r`.
    """

    def __init__(
        self,
        model: nn.Module,
        guidance: nn.Module,
        *,
        attack: AttackParameters,
        clean_weight: float,
        adv_weight: float,
        attack_name: AttackName = "cag",
        guidance_training: GuidanceTraining = "joint",
        guidance_logit_weight: float = 0.0,
        divergence_mean: DivergenceMean = "elements",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, attack)
        self.guidance = copy.deepcopy(model) if guidance_training == "ema" else guidance
        self.attack_name, self.guidance_training = attack_name, guidance_training
        self.loss_parameters: dict[str, Any] = {
            "clean_weight": clean_weight,
            "adv_weight": adv_weight,
            "guidance_logit_weight": guidance_logit_weight,
            "divergence_mean": divergence_mean,
            "label_smoothing": label_smoothing,
        }
        if not self._guidance_learns():
            self.guidance.eval().requires_grad_(False)
        if guidance_training == "ema":
            self.register_buffer("averaged_steps", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "D2R":
        super().train(mode)
        if not self._guidance_learns():
            self.guidance.eval()
        return self

    def begin_step(self, warm_up: WarmUp, epochs: float) -> None:
        super().begin_step(warm_up, epochs)
        if self.guidance_training == "ema":
            self._average_target()

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        match self.attack_name:
            case "cag":
                return self._cag(self.guidance, x, generator)
            case "trades":
                return self._cag(self.model, x, generator)
            case "pgd":
                return self._pgd(x, y, generator)

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        # Three passes in the published order: the target's BatchNorm sees the adversarial batch before the clean one.
        adv_logits = self.model(x_adv)
        clean_logits = self.model(x)
        guidance_logits = self.guidance(x_adv if self.guidance_training == "adversarial" else x)
        labelled = clean_logits if self.guidance_training == "ema" else guidance_logits
        if self.guidance_training == "adversarial":
            guidance_logits = guidance_logits.detach()
        terms = losses.d2r(
            adv_logits,
            clean_logits,
            guidance_logits,
            y,
            labelled_logits=labelled,
            regularization=self.regularization,
            **self.loss_parameters,
        )
        return terms | _accuracies(clean_logits, adv_logits, y)

    def _guidance_learns(self) -> bool:
        return self.guidance_training in ("joint", "adversarial")

    @torch.no_grad()
    def _average_target(self) -> None:
        """Move the guidance's parameters and statistics towards the target's."""
        steps = self.get_buffer("averaged_steps").add_(1)
        weight = (1.0 / steps).clamp_min(1 - _EMA_DECAY)
        for average, current in zip(self.guidance.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(current, weight.to(average.dtype))
            else:
                average.copy_(current)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean().detach()


def _accuracies(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "batch_clean_accuracy": _accuracy(clean_logits, labels),
        "batch_robust_accuracy": _accuracy(adv_logits, labels),
    }
