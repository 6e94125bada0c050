"""The gate before @champion: floors, self-checks, data validation and the present champion decide about a version."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

from d2r_core import checkpoint, data, runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import RobustnessReport, SelfCheck
from tasks.registry import gate_rules, integrity, paired
from tasks.registry.decision import Decision, Rule
from tasks.registry.gate_rules import Evidence
from tasks.registry.status import identity_of
from tasks.registry.versions import connect, fetch_checkpoint, resolve_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Verdict(NamedTuple):
    """Whether a version may become champion; each reason is a sentence with its figures."""

    passed: bool
    reasons: tuple[str, ...]  # of the rules that failed, or of all where none did
    rules: tuple[Rule, ...] = ()


class _Comparison(NamedTuple):
    """The rules about the champion, and where its predictions come from."""

    rules: list[Rule]
    predictions: Literal["recorded", "attacked again"] | None = None  # None: nothing was compared


def judge(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Judge a version by every rule; write `reports/decision.json` and tag the version with the decision.

    A failed self-check refuses it: its figures may be too high. A skipped check does not block promotion, and is
    mentioned among the reasons. The champion's recorded predictions are used if they come from the same data and
    evaluation; otherwise the champion is attacked anew on the present test images.

    Raises:
        UserError: the version is unknown, its files are not the ones that were registered, its predictions are not on
            record, or the champion's checkpoint cannot be had.
    """
    name = settings.promote.model_name
    with connect(settings, paths) as client, tempfile.TemporaryDirectory() as folder:
        challenger = client.get_model_version(name, str(version))
        if "robust_accuracy" not in challenger.tags:
            raise UserError(f"{name} version {version} has no figures: it was not registered by `d2r`.")
        integrity.verify(challenger)
        champion_version = resolve_alias(client, name, "champion")
        examples = _examples(client, paths, challenger, folder)
        metadata = checkpoint.read_metadata(fetch_checkpoint(client, challenger, "target.json", folder))
        comparison = _against_champion(client, settings, paths, challenger, champion_version, examples, metadata)
        rules = [
            *_floors(settings, challenger),
            _above_chance(examples, len(metadata["classes"])),
            *gate_rules.self_checks(_checks_not_passed(challenger)),
            _data_validation(client, paths, challenger, folder),
            *comparison.rules,
        ]
        decision = Decision(
            model_name=name,
            version=version,
            passed=all(rule.verdict != "failed" for rule in rules),
            **identity_of(challenger).model_dump(),
            champion=champion_version,
            champion_predictions=comparison.predictions,
            confidence=settings.promote.confidence,
            margin=settings.promote.margin,
            rules=tuple(rules),
        )
        _tag(client, settings, decision)
    decision.write(paths.decision)
    return Verdict(decision.passed, decision.reasons, decision.rules)


def _tag(client: "MlflowClient", settings: Settings, decision: Decision) -> None:
    """Write the decision onto the version, whose run may come to hold another evaluation."""
    tags = {
        "gate": "passed" if decision.passed else "failed",
        "gate_settings": settings.hash("promote"),
        "gate_reasons": "\n".join(decision.reasons),
        "decision": decision.model_dump_json(),
    }
    for key, value in tags.items():
        client.set_model_version_tag(decision.model_name, str(decision.version), key, value)


def _examples(client: "MlflowClient", paths: Paths, version: "ModelVersion", folder: str) -> pd.DataFrame:
    """What the version says of each image, from the files here or from its run."""
    identity = identity_of(version)
    if paths.robustness.is_file() and RobustnessReport.read(paths.robustness).identity == identity:
        return _target(pd.read_parquet(paths.examples))
    recorded = paired.recorded(client, version, paths, folder)
    if isinstance(recorded, str):
        raise UserError(f"{recorded} Evaluate it anew: `d2r run`.")
    robustness, examples = recorded
    if robustness.identity != identity:
        raise UserError(
            f"The run of {version.name} version {version.version} holds the predictions of a later evaluation. "
            "Evaluate it anew: `d2r run`."
        )
    return _target(examples)


def _target(examples: pd.DataFrame) -> pd.DataFrame:
    return examples[examples["model"] == "target"]


def _floors(settings: Settings, version: "ModelVersion") -> list[Rule]:
    limits, tags = settings.promote, version.tags
    attack = f"Robust accuracy (worst attack, eps {float(tags['eps']):.4g})"
    clean, robust = float(tags["clean_accuracy"]), float(tags["robust_accuracy"])
    rules = [
        gate_rules.floor("min_clean_accuracy", "Clean accuracy", clean, limits.min_clean_accuracy),
        gate_rules.floor("min_robust_accuracy", attack, robust, limits.min_robust_accuracy),
    ]
    if "autoattack" in tags:
        # PGD and CW alone are an upper bound, and how high it lies differs from model to model.
        figure, accuracy = f"Accuracy under {tags['autoattack']}", float(tags["autoattack_accuracy"])
        rules.append(gate_rules.floor("min_robust_accuracy", figure, accuracy, limits.min_robust_accuracy))
    return rules


def _above_chance(examples: pd.DataFrame, classes: int) -> Rule:
    images = examples["index"].nunique()
    rows = examples.groupby("attack", sort=False).filter(lambda attack: len(attack) == images)
    worst = rows.groupby("index")["correct"].all()
    return gate_rules.above_chance(int(worst.sum()), images, classes)


def _checks_not_passed(version: "ModelVersion") -> list[SelfCheck] | None:
    if "checks" not in version.tags:
        return None
    return [SelfCheck.model_validate(check) for check in json.loads(version.tags["checks_not_passed"])]


def _data_validation(client: "MlflowClient", paths: Paths, version: "ModelVersion", folder: str) -> Rule:
    """By the record here, or where other data lie here by now, by that of the version's run."""
    data_hash = identity_of(version).data_hash
    accepted = _accepted_hash(paths.accepted)
    if accepted != data_hash:
        name = paths.accepted.relative_to(paths.reports).as_posix()
        accepted = _accepted_hash(paired.fetch(client, version, name, folder))
    return gate_rules.data_validation(data_hash, accepted)


def _accepted_hash(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["data_hash"])


def _against_champion(
    client: "MlflowClient",
    settings: Settings,
    paths: Paths,
    challenger: "ModelVersion",
    champion_version: int | None,
    examples: pd.DataFrame,
    metadata: dict[str, Any],
) -> _Comparison:
    """The challenger beside the champion, both on the challenger's test images.

    Args:
        examples, metadata: the challenger's predictions and its checkpoint's JSON.
    """
    if champion_version is None:
        return _Comparison([_champion_rule(True, "There is no champion to compare with.")])
    if champion_version == int(challenger.version):
        return _Comparison([_champion_rule(True, "It is the champion itself.")])
    champion = client.get_model_version(challenger.name, str(champion_version))
    with tempfile.TemporaryDirectory() as folder:
        other = checkpoint.read_metadata(fetch_checkpoint(client, champion, "target.json", folder))
        for what, own, others in (
            ("class list", metadata["classes"], other["classes"]),
            ("image size", metadata["architecture"]["image_size"], other["architecture"]["image_size"]),
        ):
            if own != others:
                reason = (
                    f"Its {what} is not that of the champion (version {champion_version}), {_short(own)} against "
                    f"{_short(others)}, so the two cannot be compared. Promote it by hand, or choose another "
                    "promote.model_name."
                )
                return _Comparison([_champion_rule(False, reason)])
        champion_examples = _recorded_in_same_evaluation(client, paths, champion, challenger, folder)
        predictions: Literal["recorded", "attacked again"] = "recorded"
        if champion_examples is None:
            weights = fetch_checkpoint(client, champion, "target.safetensors", folder)
            champion_examples = _attack_again(settings, paths, challenger, weights)
            predictions = "attacked again"
    evidence = Evidence(
        pairs=paired.pair(examples, champion_examples, examples["index"].nunique()),
        labels=examples.drop_duplicates("index").set_index("index")["label"],
        new_data=identity_of(champion).data_hash != identity_of(challenger).data_hash,
        champion=f"version {champion_version}, {predictions}",
        seed=settings.seed,
    )
    return _Comparison(gate_rules.against_champion(evidence, settings.promote), predictions)


def _recorded_in_same_evaluation(
    client: "MlflowClient", paths: Paths, champion: "ModelVersion", challenger: "ModelVersion", folder: str
) -> pd.DataFrame | None:
    """The champion's predictions, if its run has those of the data and evaluation of the challenger."""
    recorded = paired.recorded(client, champion, paths, folder)
    if isinstance(recorded, str):
        return None
    robustness, examples = recorded
    if robustness.identity.weights_sha256 != identity_of(champion).weights_sha256:
        return None
    return _target(examples) if robustness.identity.same_evaluation(identity_of(challenger)) else None


def _attack_again(settings: Settings, paths: Paths, challenger: "ModelVersion", weights: Path) -> pd.DataFrame:
    """What the model at `weights` says of each present test image, on which the challenger was measured."""
    from tasks.evaluation.evaluate_model import evaluate_model

    present = {"data_hash": read_manifest(paths)["hash"], "evaluation_hash": settings.hash("seed", "evaluate")}
    if identity_of(challenger) != identity_of(challenger).model_copy(update=present):
        raise UserError(
            f"{challenger.name} version {challenger.version} was measured on other data or with other `evaluate` "
            "settings than the present ones, so the champion cannot be measured beside it. Run `d2r run`."
        )
    model, metadata = checkpoint.load(weights, runtime.device(settings.runtime.device))
    test = data.load_split(paths.prepared / "test.safetensors")
    measured = evaluate_model(
        model,
        test,
        settings.evaluate,
        classes=len(metadata["classes"]),
        seed=settings.seed,
        description="champion",
    )
    return measured.examples.assign(model="target")


def _champion_rule(passed: bool, reason: str) -> Rule:
    return Rule(name="champion", verdict="passed" if passed else "failed", reason=reason)


def _short(value: object) -> str:
    return f"{len(value)} classes ({', '.join(value[:3])}, ...)" if isinstance(value, list) else f"{value} pixels"
