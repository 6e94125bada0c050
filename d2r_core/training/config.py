"""The hyper-parameters of a training run."""

from dataclasses import dataclass, field
from typing import Literal

from d2r_core.runtime import Precision
from d2r_core.training.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class WeightPerturbation:
    """Adversarial weight perturbation (Wu et al. 2020); see `awp.perturbed`."""

    gamma: float = 0.0  # relative to each weight's norm; 0 disables it
    from_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Which average of the model's weights is validated and saved instead of the weights themselves.

    "ema": exponential moving average over the steps (Polyak; as TRADES-AWP and later work use it). "swa": plain mean
    of the epochs' weights (Izmailov et al. 2018).
    """

    name: Literal["none", "ema", "swa"] = "none"
    decay: float = 0.999  # of "ema", per step
    from_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Epochs in which the attack and the regularisation grow linearly from nothing; 0: in full from the first step.

    The attack: radius and step size (eps warm-up; Cai et al. 2018, Pang et al. 2021, section 4). The regularisation:
    every term of the loss but the cross-entropy (as Laine & Aila 2017 let their consistency term grow, eq. in sec. 3).
    """

    eps_epochs: float = 0.0
    regularization_epochs: float = 0.0

    def eps_factor(self, epochs: float) -> float:
        """The factor on eps and step size after so many epochs, 0 to 1."""
        return _growth(epochs, self.eps_epochs)

    def regularization_factor(self, epochs: float) -> float:
        """The factor on the regularisation after so many epochs, 0 to 1."""
        return _growth(epochs, self.regularization_epochs)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """SGD with momentum over shuffled, cropped and flipped batches; by default without any option on top."""

    epochs: int  # 0: the initial weights are validated and returned
    batch_size: int  # of one step, over all processes
    learning_rate: float
    schedule: Schedule
    momentum: float
    weight_decay: float
    crop_padding: int  # pixels on each side; 0: no random crop
    flip: bool
    seed: int  # of the order, the crops and flips, and the attack's noise
    gradient_clip: float | None = None  # maximum norm of the gradient
    weight_perturbation: WeightPerturbation = field(default_factory=WeightPerturbation)
    averaging: Averaging = field(default_factory=Averaging)
    warm_up: WarmUp = field(default_factory=WarmUp)
    precision: Precision = "fp32"


def _growth(epochs: float, length: float) -> float:
    return 1.0 if epochs >= length else epochs / length
