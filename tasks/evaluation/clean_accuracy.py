"""The accuracy without an attack, looked at before hours of attacks: a wrong model shows there first."""

from d2r_core import runtime
from d2r_core.attacks.pgd import Clean
from d2r_core.attacks.run import run_attack
from d2r_core.errors import UserError
from d2r_core.evaluation.statistics import accuracy_with_interval
from tasks.evaluation.evaluate_models import EvaluationSetup, LoadedModel
from tasks.evaluation.report_schema import Accuracy

_NEAR_CHANCE = 0.1  # of the way from guessing to always right


def clean_accuracy(evaluated: LoadedModel, setup: EvaluationSetup) -> Accuracy:
    """On all test images."""
    config = setup.config(evaluated).without_cache()
    runtime.set_precision(config.precision)
    result = run_attack(evaluated.model, setup.test, Clean(), config)
    return Accuracy(**accuracy_with_interval(result.correct(setup.test.labels.cpu())))


def require(clean: Accuracy, expected: float) -> None:
    """Raise UserError if `expected` (0 to 1) lies outside the 95 % interval of the clean accuracy."""
    low, high = clean.interval
    if not low <= expected <= high:
        raise UserError(
            f"--expect-clean {100 * expected:g}: the clean accuracy is {clean.accuracy:.2%} ({low:.2%} to {high:.2%}, "
            f"{clean.images} images), so this is another model than the expected one, or it is fed otherwise: "
            "check its normalisation, the architecture's options, the entry of the file, and the order of the classes."
        )


def chance_warning(clean: Accuracy, classes: int) -> str | None:
    """A sentence where the accuracy is near that of guessing, which hardly any published model has."""
    chance = 1 / classes
    if clean.accuracy > chance + _NEAR_CHANCE * (1 - chance):
        return None
    return (
        f"The clean accuracy is {clean.accuracy:.2%}, near chance ({chance:.2%}): the model is hardly the one that it "
        "is taken for. Check its normalisation, the architecture's options, and the order of the classes."
    )
