"""Stage `train`: the target model, by D2R on CAG's adversarial examples or by a baseline method on equal terms."""

from collections.abc import Callable
from functools import partial

from torch import nn

from d2r_core import checkpoint, runtime
from d2r_core.attacks import PGD, Clean
from d2r_core.training.methods import (
    D2R,
    AdversarialTraining,
    AttackParameters,
    Lbgat,
    Standard,
    Trades,
    TrainingMethod,
)
from d2r_core.training.trainer import BestCheckpoint
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.training.run_training import TrainingJob, run_training

_VALIDATION_STEPS = 10  # of the PGD attack that selects the checkpoint


def run(settings: Settings, paths: Paths) -> BestCheckpoint:
    """Train the target model and write `models/target.safetensors` with its JSON and history.

    The best epoch is the one with the highest PGD-10 accuracy on the validation split; test images are never used.
    """
    return run_training(settings, paths, training_job(settings, paths))


def training_job(settings: Settings, paths: Paths) -> TrainingJob:
    """The training that the settings describe, with the guidance model of `paths`."""
    section = settings.train
    guidance, metadata = checkpoint.load(paths.guidance, runtime.device(settings.runtime.device))
    return TrainingJob(
        stage="train",
        section=section,
        # Not the seed of pretraining: two models of one architecture must not start from the same weights.
        seed=settings.seed + 1,
        method=_method(settings, guidance),
        validation_attacks={
            "clean_accuracy": Clean(),
            "robust_accuracy": PGD(eps=section.eps, step_size=section.step_size, steps=_VALIDATION_STEPS),
        },
        select_by="robust_accuracy",
        weights=paths.target,
        history=paths.train_history,
        inputs=metadata["weights_sha256"],
    )


def _method(settings: Settings, guidance: nn.Module) -> Callable[[nn.Module], TrainingMethod]:
    """The method that the settings name, as a function of the target model."""
    section, method = settings.train, settings.train.method
    attack: AttackParameters = {"eps": section.eps, "step_size": section.step_size, "steps": section.steps}
    smoothing = section.label_smoothing
    match method.name:
        case "d2r":
            return partial(
                D2R,
                guidance=guidance,
                attack=attack,
                clean_weight=method.clean_weight,
                adv_weight=method.adv_weight,
                attack_name=method.attack,
                guidance_training=method.guidance,
                guidance_logit_weight=method.guidance_logit_weight,
                divergence_mean=method.divergence_mean,
                label_smoothing=smoothing,
            )
        case "lbgat":
            return partial(Lbgat, guidance=guidance, attack=attack, beta=method.beta, label_smoothing=smoothing)
        case "trades":
            return partial(Trades, attack=attack, beta=method.beta, label_smoothing=smoothing)
        case "at":
            return partial(AdversarialTraining, attack=attack, label_smoothing=smoothing)
        case "standard":
            return partial(Standard, label_smoothing=smoothing)


if __name__ == "__main__":
    entry_point.main(run)
