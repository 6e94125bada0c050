"""The rules of the gate: each a function of figures alone, so that a simulation can apply them as the gate does.

What was compared with what comes from tasks/registry/gate.py; docs/registry.md explains every rule.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch

from d2r_core.evaluation.statistics import (
    non_inferior,
    paired_score_interval,
    sign_test,
    wilson,
    worst_class_bootstrap,
)
from tasks.config.settings import Promote
from tasks.evaluation.report_schema import AttackComparison, SelfCheck
from tasks.registry import paired
from tasks.registry.decision import Outcome, Rule


class Evidence(NamedTuple):
    """Challenger and champion on the same images under the same attacks."""

    pairs: dict[str, pd.DataFrame]  # by attack, as `paired.pair` makes them
    labels: "pd.Series[int]"  # by image
    new_data: bool  # whether the champion was trained on other data: a refresh, which needs no gain
    champion: str  # for people: "version 3, recorded"
    seed: int


def floor(name: str, figure: str, accuracy: float, limit: float) -> Rule:
    """An accuracy against the floor in the setting `promote.NAME`."""
    passed = accuracy >= limit
    comparison = "reaches" if passed else "is below"
    reason = f"{figure} {accuracy:.2%} {comparison} the floor of {limit:.2%} (promote.{name})."
    return Rule(name=name, verdict=_verdict(passed), reason=reason, figures={"accuracy": accuracy, "floor": limit})


def above_chance(correct: int, images: int, classes: int) -> Rule:
    """A robust accuracy that guessing would reach is none."""
    low, high = wilson(correct, images)
    passed = low > 1 / classes
    reason = (
        f"Robust accuracy {correct / images:.2%} of {images} images (95 % interval {low:.2%} to {high:.2%}) is "
        f"{'above' if passed else 'not shown to be above'} chance, {1 / classes:.2%} with {classes} classes."
    )
    figures = {"accuracy": correct / images, "images": images, "chance": 1 / classes, "low": low, "high": high}
    return Rule(name="above_chance", verdict=_verdict(passed), reason=reason, figures=figures)


def training(collapsed: bool) -> Rule:
    """A training that ended at chance has failed, even if an earlier checkpoint looks passable."""
    reason = (
        "In the last epochs of its training, the accuracy on unperturbed validation images was at chance."
        if collapsed
        else "Its training did not collapse."
    )
    return Rule(name="training", verdict=_verdict(not collapsed), reason=reason)


def self_checks(checks: Sequence[SelfCheck]) -> list[Rule]:
    """Where the evaluation looked for reasons to distrust itself: the checks that failed or were skipped."""
    if not checks:
        reason = "No self-checks were recorded with its figures. Evaluate it anew: `d2r run`."
        return [Rule(name="self_checks", verdict="failed", reason=reason)]
    rules = [
        Rule(
            name=f"self_check_{check.key}",
            verdict="undecided" if check.passed is None else "failed",
            reason=f"Self-check {'skipped' if check.passed is None else 'failed'}: {check.name}. {check.message} "
            f"See docs/evaluation.md#{check.key.replace('_', '-')}.",
        )
        for check in checks
        if check.passed is not True
    ]
    return rules or [Rule(name="self_checks", verdict="passed", reason="All self-checks passed.")]


def data_validation(data_hash: str, accepted: str | None) -> Rule:
    """Whether the stage `validate` accepted the data that the version was trained and measured on."""
    passed = accepted == data_hash
    reason = (
        f"The data validation accepted its data ({data_hash[:12]})."
        if passed
        else f"No data validation that accepted its data ({data_hash[:12]}) is on record. "
        "Validate them: `d2r stage validate`."
    )
    return Rule(name="data_validation", verdict=_verdict(passed), reason=reason)


def against_champion(evidence: Evidence, limits: Promote) -> list[Rule]:
    """The comparisons with the champion, image by image."""
    rules = [
        _non_inferior_robust(evidence, limits) if evidence.new_data else _gain(evidence, limits),
        _clean(evidence, limits),
        _worst_class(evidence, limits),
    ]
    return rules + ([_autoattack(evidence, limits)] if "autoattack" in evidence.pairs else [])


def _gain(evidence: Evidence, limits: Promote) -> Rule:
    """On the same data an equally good model gains nothing, so that the champion stays."""
    compared = _compared(evidence, "worst", "Robust accuracy")
    p = sign_test(compared.only_challenger, compared.only_champion)
    supported = p <= 1 - limits.confidence
    reason = (
        f"{_difference(compared, evidence, limits)} The gain is {'' if supported else 'not '}supported by McNemar's "
        f"exact test: p = {p:.2g}, at most {1 - limits.confidence:.2g} needed (promote.confidence)."
    )
    return _rule("robust_accuracy", _verdict(supported), reason, compared, limits, p=p)


def _non_inferior_robust(evidence: Evidence, limits: Promote) -> Rule:
    compared = _compared(evidence, "worst", "Robust accuracy")
    return _must_be_non_inferior("robust_accuracy", compared, evidence, limits, "Trained on new data, it is")


def _clean(evidence: Evidence, limits: Promote) -> Rule:
    compared = _compared(evidence, "clean", "Clean accuracy")
    return _must_be_non_inferior("clean_accuracy", compared, evidence, limits, "It is")


def _must_be_non_inferior(
    name: str, compared: AttackComparison, evidence: Evidence, limits: Promote, subject: str
) -> Rule:
    passed = _shown(compared, limits)
    reason = f"{_difference(compared, evidence, limits)} {subject} {'' if passed else 'not '}{_within(limits)}"
    return _rule(name, _verdict(passed), reason, compared, limits)


def _worst_class(evidence: Evidence, limits: Promote) -> Rule:
    """A class has few images, so the burden of proof is turned: a loss beyond the margin must be shown to refuse."""
    pairs = evidence.pairs["worst"].sort_index()
    challenger, champion = paired.tensors(pairs)
    labels = torch.from_numpy(evidence.labels.loc[pairs.index].to_numpy(copy=True))
    lowest = [
        min(float(side[labels == label].double().mean()) for label in labels.unique())
        for side in (challenger, champion)
    ]
    interval = worst_class_bootstrap(
        challenger, champion, labels, seed=evidence.seed, confidence=2 * limits.confidence - 1
    )
    low, high = interval
    fewest = int(labels.unique(return_counts=True)[1].min())
    verdict: Outcome
    if high < -limits.margin:
        verdict, conclusion = "failed", f"It loses more than {limits.margin:.2%} (promote.margin)."
    elif low > -limits.margin:
        verdict, conclusion = "passed", f"It is {_within(limits)}"
    else:
        verdict, conclusion = "undecided", f"Too few images to tell: {fewest} in the smallest class."
    reason = (
        f"Robust accuracy of the worst class {lowest[0]:.2%}, the champion's {lowest[1]:.2%} ({evidence.champion}), "
        f"difference between {low:+.2%} and {high:+.2%}. {conclusion}"
    )
    figures = {"challenger": lowest[0], "champion": lowest[1], "images": len(pairs), "fewest_images": fewest}
    figures["margin"] = limits.margin
    return Rule(name="worst_class", verdict=verdict, reason=reason, figures=figures, interval=interval)


def _autoattack(evidence: Evidence, limits: Promote) -> Rule:
    """AutoAttack runs on few images: where they could not even show equal models to be equal, it does not block."""
    compared = _compared(evidence, "autoattack", "Accuracy under AutoAttack")
    low, high = _interval(compared, limits)
    difference = _difference(compared, evidence, limits)
    if _shown(compared, limits):
        return _rule("autoattack", "passed", f"{difference} It is {_within(limits)}", compared, limits)
    if high < -limits.margin or compared.difference - low < limits.margin:
        return _rule("autoattack", "failed", f"{difference} It is not {_within(limits)}", compared, limits)
    reason = f"{difference} Too few images to tell whether it is {_within(limits)}"
    return _rule("autoattack", "undecided", reason, compared, limits)


def _compared(evidence: Evidence, attack: str, name: str) -> AttackComparison:
    return paired.compare_attack(name, evidence.pairs[attack], evidence.seed)


def _shown(compared: AttackComparison, limits: Promote) -> bool:
    return non_inferior(
        compared.only_challenger,
        compared.only_champion,
        compared.images,
        margin=limits.margin,
        confidence=limits.confidence,
    )


def _interval(compared: AttackComparison, limits: Promote) -> tuple[float, float]:
    """Each end at the one-sided confidence of the settings."""
    return paired_score_interval(
        compared.only_challenger, compared.only_champion, compared.images, confidence=2 * limits.confidence - 1
    )


def _difference(compared: AttackComparison, evidence: Evidence, limits: Promote) -> str:
    low, high = _interval(compared, limits)
    return (
        f"{compared.name} {compared.challenger:.2%}, the champion's {compared.champion:.2%} ({evidence.champion}) on "
        f"the same {compared.images} images, difference between {low:+.2%} and {high:+.2%}."
    )


def _within(limits: Promote) -> str:
    return f"shown to lose less than {limits.margin:.2%} (promote.margin)."


def _verdict(passed: bool) -> Outcome:
    return "passed" if passed else "failed"


def _rule(
    name: str, verdict: Outcome, reason: str, compared: AttackComparison, limits: Promote, **figures: float
) -> Rule:
    counts = compared.model_dump(exclude={"name", "interval"})
    return Rule(
        name=name,
        verdict=verdict,
        reason=reason,
        figures={**counts, "margin": limits.margin, **figures},
        interval=_interval(compared, limits),
    )
