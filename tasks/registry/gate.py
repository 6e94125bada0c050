"""The gate before @champion: self-checks, floors and the present champion decide about a version."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2r_core import checkpoint, data, runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import SelfCheck
from tasks.registry.lock import registry_lock
from tasks.registry.status import identity_of
from tasks.registry.versions import connect, fetch_checkpoint, resolve_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Verdict(NamedTuple):
    """Whether a version may become champion; each reason is a sentence with its figures."""

    passed: bool
    reasons: tuple[str, ...]


class _Finding(NamedTuple):
    """One thing that the gate looked at."""

    passed: bool
    reason: str


def judge(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Judge a version by its self-checks, the floors of `promote` and the champion; tag it with the verdict.

    A failed self-check refuses it: its figures may be too high. A skipped check does not block promotion, and is
    mentioned among the reasons. The champion's recorded figure is used if it comes from the same data and evaluation;
    otherwise the champion is attacked anew on the present test images.

    Raises:
        UserError: the version is unknown, or the champion's checkpoint cannot be had.
    """
    name = settings.promote.model_name
    with connect(settings, paths) as client:
        challenger = client.get_model_version(name, str(version))
        if "robust_accuracy" not in challenger.tags:
            raise UserError(f"{name} version {version} has no figures: it was not registered by `d2r`.")
        findings = [
            *_floors(settings, challenger),
            *_self_checks(challenger),
            *_autoattack(settings, challenger),
            _against_champion(client, settings, paths, challenger),
        ]
        passed = all(finding.passed for finding in findings)
        verdict = Verdict(passed, tuple(finding.reason for finding in findings if finding.passed == passed))
        tags = {
            "gate": "passed" if passed else "failed",
            "gate_settings": settings.hash("promote"),
            "gate_reasons": "\n".join(verdict.reasons),
        }
        with registry_lock(client, name):
            for key, value in tags.items():
                client.set_model_version_tag(name, str(version), key, value)
    return verdict


def _floors(settings: Settings, version: "ModelVersion") -> list[_Finding]:
    limits, tags = settings.promote, version.tags
    attack = f"Robust accuracy (worst attack, eps {float(tags['eps']):.4g})"
    return [
        _floor("Clean accuracy", tags["clean_accuracy"], limits.min_clean_accuracy, "promote.min_clean_accuracy"),
        _floor(attack, tags["robust_accuracy"], limits.min_robust_accuracy, "promote.min_robust_accuracy"),
    ]


def _autoattack(settings: Settings, version: "ModelVersion") -> list[_Finding]:
    """PGD and CW alone are an upper bound, and how high it lies differs from model to model."""
    if "autoattack" not in version.tags:
        return []
    figure, accuracy = f"Accuracy under {version.tags['autoattack']}", version.tags["autoattack_accuracy"]
    return [_floor(figure, accuracy, settings.promote.min_robust_accuracy, "promote.min_robust_accuracy")]


def _floor(figure: str, tag: str, floor: float, key: str) -> _Finding:
    accuracy = float(tag)
    passed = accuracy >= floor
    comparison = "reaches" if passed else "is below"
    return _Finding(passed, f"{figure} {accuracy:.2%} {comparison} the floor of {floor:.2%} ({key}).")


def _self_checks(version: "ModelVersion") -> list[_Finding]:
    """Where the evaluation looked for reasons to distrust itself."""
    if "checks" not in version.tags:
        return [_Finding(False, "No self-checks were recorded with its figures. Evaluate it anew: `d2r run`.")]
    checks = [SelfCheck.model_validate(check) for check in json.loads(version.tags["checks_not_passed"])]
    findings = [
        _Finding(
            check.passed is None,
            f"Self-check {'skipped' if check.passed is None else 'failed'}: {check.name}. {check.message} "
            f"See docs/evaluation.md#{check.key.replace('_', '-')}.",
        )
        for check in checks
    ]
    return findings or [_Finding(True, "All self-checks passed.")]


def _against_champion(client: "MlflowClient", settings: Settings, paths: Paths, challenger: "ModelVersion") -> _Finding:
    """Whether the challenger is as robust as the champion, both on the challenger's data."""
    champion_version = resolve_alias(client, challenger.name, "champion")
    if champion_version is None:
        return _Finding(True, "There is no champion to compare with.")
    if champion_version == int(challenger.version):
        return _Finding(True, "It is the champion itself.")
    champion = client.get_model_version(challenger.name, str(champion_version))
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        own = checkpoint.read_metadata(fetch_checkpoint(client, challenger, "target.json", ours))
        other = checkpoint.read_metadata(fetch_checkpoint(client, champion, "target.json", theirs))
        for what, mine, champions in (
            ("class list", own["classes"], other["classes"]),
            ("image size", own["architecture"]["image_size"], other["architecture"]["image_size"]),
        ):
            if mine != champions:
                return _Finding(
                    False,
                    f"Its {what} is not that of the champion (version {champion_version}), {_short(mine)} against "
                    f"{_short(champions)}, so the two cannot be compared. Promote it by hand, or choose another "
                    "promote.model_name.",
                )
        if identity_of(champion).same_evaluation(identity_of(challenger)):
            accuracy, how = float(champion.tags["robust_accuracy"]), "as recorded on the same data"
        else:
            weights = fetch_checkpoint(client, champion, "target.safetensors", theirs)
            accuracy, how = _robust_accuracy_here(settings, paths, challenger, weights), "measured anew on this data"
    robust, allowed = float(challenger.tags["robust_accuracy"]), settings.promote.max_regression
    passed = robust >= accuracy - allowed - 1e-9  # the subtraction's rounding must not decide
    return _Finding(
        passed,
        f"Robust accuracy {robust:.2%} {'holds against' if passed else 'falls behind'} the champion's {accuracy:.2%} "
        f"(version {champion_version}, {how}; promote.max_regression is {allowed:.2%}).",
    )


def _robust_accuracy_here(settings: Settings, paths: Paths, challenger: "ModelVersion", weights: Path) -> float:
    """Attack the model at `weights` on the present test images, on which the challenger was measured."""
    from tasks.evaluation.evaluate_model import evaluate_model

    present = {"data_hash": read_manifest(paths)["hash"], "evaluation_hash": settings.hash("seed", "evaluate")}
    if identity_of(challenger) != identity_of(challenger).model_copy(update=present):
        raise UserError(
            f"{challenger.name} version {challenger.version} was measured on other data or with other `evaluate` "
            "settings than the present ones, so the champion cannot be measured beside it. Run `d2r run`."
        )
    model, metadata = checkpoint.load(weights, runtime.device(settings.runtime.device))
    test = data.load_split(paths.prepared / "test.safetensors")
    attacks = settings.evaluate
    if attacks.autoattack_images < len(test):  # then it is no part of the worst of all images
        attacks = attacks.model_copy(update={"autoattack_images": 0})
    measured = evaluate_model(
        model, test, attacks, classes=len(metadata["classes"]), seed=settings.seed, description="champion"
    )
    return float(measured.figures["worst"]["accuracy"])


def _short(value: object) -> str:
    return f"{len(value)} classes ({', '.join(value[:3])}, ...)" if isinstance(value, list) else f"{value} pixels"
