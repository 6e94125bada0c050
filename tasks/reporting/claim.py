"""An evaluation as RobustBench's `model_info` JSON, with which a model is submitted (Croce et al. 2021)."""

from fractions import Fraction
from typing import Any

from d2r_core.errors import UserError
from tasks.config.settings import Evaluate
from tasks.evaluation.report_schema import RobustnessReport
from tasks.reporting import rendering

DATA_SETS = ("cifar10", "cifar100")
TEST_IMAGES = 10_000
AUTHORS_OWN = ("link", "name", "authors", "additional_data", "venue", "reported")  # what no evaluation knows


def require_claimable(source: str, test_images: int, settings: Evaluate) -> None:
    """Raise UserError unless the evaluation will be what RobustBench takes: AutoAttack standard on all test images."""
    if source not in DATA_SETS:
        raise UserError(f"--write-claim: the data are {source}; RobustBench takes {' and '.join(DATA_SETS)}.")
    if settings.autoattack != "standard" or settings.autoattack_images < test_images:
        raise UserError(
            "--write-claim: a claim rests on AutoAttack standard on all test images: "
            f"--autoattack standard --autoattack-images {test_images}."
        )


def model_info(report: RobustnessReport) -> dict[str, Any]:
    """The target's entry; None where only its authors know the answer. Accuracies are in per cent, as text.

    `unreliable` is true if a self-check failed.
    """
    attacks = report.target.attacks
    clean, autoattack = attacks["clean"], attacks["autoattack"]
    info = {
        **dict.fromkeys(AUTHORS_OWN),
        "number_forward_passes": 1,
        "dataset": report.data.source,
        "architecture": rendering.name(report.target.architecture),
        "eps": _eps(autoattack.eps),
        "clean_acc": f"{100 * clean.accuracy:.2f}",
        "autoattack_acc": f"{100 * autoattack.accuracy:.2f}",
        "unreliable": any(check.passed is False for check in report.target.checks),
    }
    if autoattack.images != TEST_IMAGES:
        info["footnote"] = f"Evaluated on {autoattack.images} test images."
    return info


def _eps(eps: float) -> str:
    levels = Fraction(eps * 255).limit_denominator(4)
    return f"{levels}/255" if levels.denominator == 1 and abs(float(levels) - eps * 255) < 1e-6 else f"{eps:.6g}"
