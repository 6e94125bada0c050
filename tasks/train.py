"""Stage `train`: the target model, by D2R on CAG's adversarial examples, or by a rival on equal terms."""

from collections.abc import Callable
from functools import partial

from torch import nn

from d2r_core import checkpoint, runtime
from d2r_core.attacks import PGD, Clean
from d2r_core.training.methods import D2R, AdversarialTraining, Attack, Lbgat, Objective, Standard, Trades
from d2r_core.training.trainer import Kept
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.training import run_training

_VALIDATION_STEPS = 10  # of the PGD attack that chooses the checkpoint


def run(settings: Settings, paths: Paths) -> Kept:
    """Train the target model and write `models/target.safetensors` with its JSON and history.

    The kept epoch is the one with the best PGD-10 accuracy on the validation split, never on the test images.
    """
    section = settings.train
    guidance, described = checkpoint.load(paths.guidance, runtime.device(settings.runtime.device))
    return run_training.fit_and_save(
        settings,
        paths,
        stage="train",
        architecture=section.architecture.model_dump(),
        objective=_objective(settings, guidance),
        criteria={
            "clean_accuracy": Clean(),
            "robust_accuracy": PGD(eps=section.eps, step_size=section.step_size, steps=_VALIDATION_STEPS),
        },
        section=section,
        epochs=section.epochs,
        # Another stream than pretraining's: two models of one architecture must not start alike.
        seed=settings.seed + 1,
        weights=paths.target,
        history=paths.train_history,
        inputs=described["weights_sha256"],
    )


def _objective(settings: Settings, guidance: nn.Module) -> Callable[[nn.Module], Objective]:
    """The method that the settings name, still without its target model."""
    section, method = settings.train, settings.train.method
    attack: Attack = {"eps": section.eps, "step_size": section.step_size, "steps": section.steps}
    smoothing = section.label_smoothing
    match method.name:
        case "d2r":
            return partial(
                D2R,
                guidance=guidance,
                attack=attack,
                clean_weight=method.clean_weight,
                adv_weight=method.adv_weight,
                freeze_guidance=method.freeze_guidance,
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
