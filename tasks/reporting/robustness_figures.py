"""The report's view of robustness.json, in rows and charts: attacks, self-checks, curves, classes, confusions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.evaluation.report_schema import (
    Accuracy,
    AttackComparison,
    AttackFigures,
    ChampionComparison,
    RobustnessReport,
    SelfCheck,
)
from tasks.reporting import charts
from tasks.reporting.charts import Axis, Mark, Series
from tasks.reporting.rendering import distance, norm_symbol, percent

MODELS = ("target", "guidance")
# The attacks in the order of the report's rows, each with what a reader must know about it.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one signed gradient step",
    "pgd": "projected gradient descent on the cross-entropy, from a random start",
    "cw": "the same on the margin of the logits",
    "autoattack": "each attack runs on the images that are robust to the ones before it",
    "worst": "correct only if correct in every row that covers all test images",
}
# The reasoning behind each self-check, for those who have no more than this page.
CHECKS = {
    "more_steps": "Where the gradients lead to errors, a longer search finds at least what a shorter one does.",
    "large_eps": "Within a large enough distance lies an image of another class; if an image is robust even there, "
    "the attack missed it.",
    "black_box": "Square uses the outputs alone; if it beats PGD, the gradients that PGD follows are misleading.",
    "transfer": "Images made against another model must not fool this one better than its own gradients do.",
    "losses": "If one of the two losses fools far more images, the other one's gradients were bent or scaled away.",
    "gradients": "Where the loss is flat or not a number, every attack that follows gradients is blind.",
    "noise": "A random step of the same size is a feeble attack; if it beats a small PGD, then PGD is broken.",
    "logits": "The gradients of probabilities or saturated scores vanish, and robustness is only apparent.",
    "eval_mode": "Outputs that change from call to call make a moving target, not a robust model.",
    "perturbation": "Re-measured in double precision from the saved images: no attack has cheated.",
}
_STYLES = {"target": "target", "guidance": "guidance dashed"}
_MATRIX = 20  # classes; of more than these, the most frequent confusions are listed instead
_FREQUENT = (8, 20)  # confusions listed beside the matrix, and without it


class AttackRow(NamedTuple):
    key: str
    note: str
    figures: dict[str, AttackFigures]  # by model
    everywhere: bool  # whether it ran on all test images
    plot: Markup

    @property
    def target(self) -> AttackFigures:
        return self.figures["target"]


class CheckRow(NamedTuple):
    reasoning: str
    results: dict[str, SelfCheck]  # by model

    @property
    def target(self) -> SelfCheck:
        return self.results["target"]


class CurveRow(NamedTuple):
    text: str  # the place on the axis
    points: dict[str, Accuracy]  # by model


class Curve(NamedTuple):
    key: str  # "eps" or "steps"
    images: int
    chart: Markup
    rows: list[CurveRow]


class ClassRow(NamedTuple):
    label: str
    images: int  # in the test split
    clean: float | None  # accuracies of the target; None without an image
    pgd: float | None
    worst: float | None
    plot: Markup


class Cell(NamedTuple):
    """Images of one label that got one prediction."""

    label: str
    prediction: str
    images: int
    share: float  # of the label's images

    @property
    def correct(self) -> bool:
        return self.label == self.prediction


class Confusion(NamedTuple):
    attack: AttackFigures
    matrix: list[list[Cell]]  # a row a label; empty if there are too many classes
    frequent: list[Cell]  # the most frequent wrong ones


class SummaryItem(NamedTuple):
    key: str
    figures: AttackFigures
    plot: Markup


class Difference(NamedTuple):
    key: str
    compared: AttackComparison
    plot: Markup


def attacks(report: RobustnessReport) -> list[AttackRow]:
    """One row per attack: its figures by model, and their plot."""
    figures = {name: model.attacks for name, model in report.models.items()}
    keys = [key for key in ATTACKS if key in figures["target"]]
    assert all(set(keys) == set(by_attack) for by_attack in figures.values()), "ATTACKS does not describe an attack"
    return [
        AttackRow(
            key=key,
            note=ATTACKS[key],
            figures={name: by_attack[key] for name, by_attack in figures.items()},
            everywhere=figures["target"][key].images == report.data.test_images,
            plot=charts.strip(
                [
                    Mark("dot" if name == "target" else "ring", name, by_attack[key].accuracy, by_attack[key].interval)
                    for name, by_attack in sorted(figures.items())
                ]
            ),
        )
        for key in keys
    ]


def checks(report: RobustnessReport) -> tuple[list[CheckRow], dict[str, Counter[bool | None]]]:
    """Every self-check with its result for each model; and how many each model passed, failed or skipped."""
    rows = [
        CheckRow(CHECKS[check.key], {name: model.checks[i] for name, model in report.models.items()})
        for i, check in enumerate(report.target.checks)
    ]
    return rows, {name: Counter(check.passed for check in model.checks) for name, model in report.models.items()}


def curves(report: RobustnessReport) -> list[Curve]:
    """Robust accuracy against eps and against the number of steps: the chart, and its figures as rows."""
    pgd = report.target.attacks["pgd"]
    assert pgd.steps is not None
    models = {name: report.models[name].curves for name in MODELS if name in report.models}
    against_eps = {name: {point.eps: point for point in model.eps} for name, model in models.items()}
    against_steps = {name: {point.steps: point for point in model.steps} for name, model in models.items()}
    radii = sorted(set().union(*against_eps.values()))
    numbers = sorted(set().union(*against_steps.values()))
    return [
        _curve(
            "eps",
            charts.radii(radii, norm_symbol(report.norm)),
            [distance(radius) for radius in radii],
            against_eps,
            marked=(pgd.eps, f"the attacks above: {pgd.eps:.4g}"),
        ),
        _curve(
            "steps",
            charts.steps(numbers),
            [str(number) for number in numbers],
            against_steps,
            marked=(pgd.steps, f"the attacks above: {pgd.steps}"),
        ),
    ]


def _curve(
    key: str,
    axis: Axis,
    texts: Sequence[str],
    models: Mapping[str, Mapping[Any, Accuracy]],
    *,
    marked: tuple[float, str],
) -> Curve:
    """`models` has each model's accuracies by the value of the axis; `texts` the axis's values for people."""
    # A curve against eps ends where no image is robust, and none is at any larger eps.
    complete = {
        name: [points.get(value, points[max(points)]) for value in axis.values] for name, points in models.items()
    }
    series = [
        Series(name, _STYLES[name], [point.accuracy for point in points], [point.interval for point in points])
        for name, points in complete.items()
    ]
    figures = "; ".join(
        f"{name}: " + ", ".join(f"{percent(point.accuracy)} at {value:.4g}" for value, point in points.items())
        for name, points in models.items()
    )
    description = f"Accuracy under PGD against {axis.title}. {figures}."
    return Curve(
        key=key,
        images=next(iter(models["target"].values())).images,
        chart=charts.curves(axis, series, scale="percent", description=description, marked=marked),
        rows=[CurveRow(text, {name: points[i] for name, points in complete.items()}) for i, text in enumerate(texts)],
    )


def per_class(report: RobustnessReport, images: Sequence[int]) -> list[ClassRow]:
    """One row per class, with the target's accuracies.

    Args:
        images: test images of each class.
    """
    figures = report.target.attacks
    rows = []
    for index, (label, count) in enumerate(zip(report.data.classes, images, strict=True)):
        clean, pgd, worst = (figures[key].per_class[index] for key in ("clean", "pgd", "worst"))
        marks = [Mark("bar", "clean", clean), Mark("bar", "worst", worst), Mark("tick", "pgd", pgd)]
        rows.append(ClassRow(label, count, clean, pgd, worst, charts.strip(marks)))
    return rows


def confusion(report: RobustnessReport) -> Confusion:
    """The target's predictions under attack."""
    recorded, classes = report.target.confusion, report.data.classes
    matrix = [
        [
            Cell(label, prediction, images, images / max(1, sum(counts)))
            for prediction, images in zip(classes, counts, strict=True)
        ]
        for label, counts in zip(classes, recorded.counts, strict=True)
    ]
    wrong = [cell for row in matrix for cell in row if cell.images and not cell.correct]
    few = len(classes) <= _MATRIX
    return Confusion(
        attack=report.target.attacks[recorded.attack],
        matrix=matrix if few else [],
        frequent=sorted(wrong, key=lambda cell: -cell.images)[: _FREQUENT[0 if few else 1]],
    )


def summary(rows: Sequence[AttackRow]) -> list[SummaryItem]:
    """The target's most important figures."""
    return [
        SummaryItem(
            row.key,
            row.target,
            charts.strip([Mark("dot", "target", row.target.accuracy, row.target.interval)]),
        )
        for row in rows
        if row.key in ("clean", "pgd", "autoattack", "worst")
    ]


def differences(comparison: ChampionComparison) -> list[Difference]:
    """One row per attack that both models met on the same images, with a plot of the difference."""
    compared = comparison.attacks or {}
    rows = [(key, compared[key]) for key in ATTACKS if key in compared]
    reach = max((abs(bound) for _, attack in rows for bound in attack.interval), default=0.0) or 1.0
    return [
        Difference(key, attack, charts.difference(attack.difference, attack.interval, 1.1 * reach))
        for key, attack in rows
    ]
