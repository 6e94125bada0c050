"""The gate before @champion: floors, self-checks, data validation and the present champion decide about a version."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import champion_evidence, decision_page, gate_rules, model_logging, signing, version_files
from tasks.registry.decision import Decision, Rule
from tasks.registry.lock import registry_lock
from tasks.registry.status import identity_of
from tasks.registry.versions import connect, resolve_alias
from tasks.tracking import runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Verdict(NamedTuple):
    """Whether a version may become champion; each reason is a sentence with its figures."""

    passed: bool
    reasons: tuple[str, ...]  # of the rules that failed, or of all where none did
    rules: tuple[Rule, ...] = ()


def judge(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Judge a version by every rule; write `reports/decision.json` and its page, and tag the version with the decision.

    Everything is read from the verified files of the version. A failed self-check refuses it: its figures may be too
    high. A skipped check does not block promotion, and is mentioned among the reasons.

    Raises:
        UserError: the version is unknown, its files are not the ones that were registered, or the champion can neither
            be compared as recorded nor be attacked again.
    """
    name = settings.promote.model_name
    with connect(settings, paths) as client, tempfile.TemporaryDirectory() as folder:
        registered = client.get_model_version(name, str(version))
        public_key = signing.trusted_key(settings, paths)
        challenger = version_files.read(registered, Path(folder, "challenger"), public_key)
        robustness, examples = challenger.evaluation()
        champion_version = resolve_alias(client, name, "champion")
        comparison = champion_evidence.compare(client, settings, paths, challenger, champion_version)
        rules = [
            *_floors(settings, robustness),
            _above_chance(examples, len(challenger.metadata["classes"])),
            gate_rules.training(bool(challenger.metadata["collapsed"])),
            *gate_rules.self_checks(robustness.target.checks),
            _data_validation(client, paths, challenger.version, folder),
            *comparison.rules,
        ]
        decision = Decision(
            model_name=name,
            version=version,
            passed=all(rule.verdict != "failed" for rule in rules),
            **robustness.identity.model_dump(),
            champion=champion_version,
            champion_predictions=comparison.predictions,
            confidence=settings.promote.confidence,
            margin=settings.promote.margin,
            rules=tuple(rules),
        )
        _tag(client, settings, decision)
        decision.write(paths.decision)
        decision_page.write(decision, paths.decision_page)
        _log_page(client, paths, challenger.version)
    return Verdict(decision.passed, decision.reasons, decision.rules)


def _tag(client: "MlflowClient", settings: Settings, decision: Decision) -> None:
    """Write the decision onto the version, whose run may come to hold another evaluation."""
    tags = {
        "gate": "passed" if decision.passed else "failed",
        "gate_settings": settings.hash("promote"),
        "gate_reasons": "\n".join(decision.reasons),
        "decision": decision.model_dump_json(),
    }
    with registry_lock(client, decision.model_name):
        for key, value in tags.items():
            client.set_model_version_tag(decision.model_name, str(decision.version), key, value)


def _log_page(client: "MlflowClient", paths: Paths, version: "ModelVersion") -> None:
    """Beside the report of this evaluation in the version's run, if the server still has the run."""
    if version.run_id and runs.find(client, version.run_id) is not None:
        folder = model_logging.evaluation_folder(identity_of(version))
        client.log_artifact(version.run_id, str(paths.decision_page), str(folder))


def _floors(settings: Settings, robustness: RobustnessReport) -> list[Rule]:
    limits, attacks = settings.promote, robustness.target.attacks
    worst = attacks["worst"]
    attack = f"Robust accuracy (worst attack, eps {worst.eps:.4g})"
    rules = [
        gate_rules.floor("min_clean_accuracy", "Clean accuracy", attacks["clean"].accuracy, limits.min_clean_accuracy),
        gate_rules.floor("min_robust_accuracy", attack, worst.accuracy, limits.min_robust_accuracy),
    ]
    if "autoattack" in attacks:
        # PGD and CW alone are an upper bound, and how high it lies differs from model to model.
        autoattack = attacks["autoattack"]
        figure = f"Accuracy under {autoattack.name} on {autoattack.images} images"
        rules.append(gate_rules.floor("min_robust_accuracy", figure, autoattack.accuracy, limits.min_robust_accuracy))
    return rules


def _above_chance(examples: pd.DataFrame, classes: int) -> Rule:
    images = examples["index"].nunique()
    rows = examples.groupby("attack", sort=False).filter(lambda attack: len(attack) == images)
    worst = rows.groupby("index")["correct"].all()
    return gate_rules.above_chance(int(worst.sum()), images, classes)


def _data_validation(client: "MlflowClient", paths: Paths, version: "ModelVersion", folder: str) -> Rule:
    """By the record here, or where other data lie here by now, by that of the version's run."""
    data_hash = identity_of(version).data_hash
    accepted = _accepted_hash(paths.accepted)
    if accepted != data_hash:
        accepted = _accepted_hash(_recorded_validation(client, paths, version, folder))
    return gate_rules.data_validation(data_hash, accepted)


def _recorded_validation(client: "MlflowClient", paths: Paths, version: "ModelVersion", folder: str) -> Path | None:
    if not version.run_id or runs.find(client, version.run_id) is None:
        return None
    relative = paths.accepted.relative_to(paths.reports)
    path = model_logging.evaluation_folder(identity_of(version)) / relative
    recorded = {entry.path for entry in client.list_artifacts(version.run_id, str(path.parent))}
    return Path(client.download_artifacts(version.run_id, str(path), folder)) if str(path) in recorded else None


def _accepted_hash(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["data_hash"])
