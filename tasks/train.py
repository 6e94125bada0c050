"""Stage `train`: the target model, by D2R on CAG's adversarial examples, beside the guidance model."""

from functools import partial

from d2r_core import checkpoint, evaluation, runtime
from d2r_core.objectives import D2R
from d2r_core.training import Kept
from tasks import fitting, stage
from tasks.paths import Paths
from tasks.settings import Settings

_VALIDATION_STEPS = 10  # of the PGD attack that chooses the checkpoint


def run(settings: Settings, paths: Paths) -> Kept:
    """Train the target model and write `models/target.safetensors` with its JSON and history.

    The kept epoch is the one with the best PGD-10 accuracy on the validation split, never on the test images.
    """
    section = settings.train
    guidance, _ = checkpoint.load(paths.guidance, runtime.device(settings.runtime.device))
    return fitting.fit_and_save(
        settings,
        paths,
        stage="train",
        architecture=section.architecture.model_dump(),
        objective=partial(
            D2R,
            guidance=guidance,
            eps=section.eps,
            step_size=section.step_size,
            steps=section.steps,
            clean_weight=section.clean_weight,
            adv_weight=section.adv_weight,
        ),
        criteria={
            "clean_accuracy": evaluation.clean(),
            "robust_accuracy": evaluation.pgd(section.eps, section.step_size, _VALIDATION_STEPS),
        },
        section=section,
        epochs=section.epochs,
        # Another stream than pretraining's: two models of one architecture must not start alike.
        seed=settings.seed + 1,
        weights=paths.target,
        history=paths.train_history,
    )


if __name__ == "__main__":
    stage.main(run)
