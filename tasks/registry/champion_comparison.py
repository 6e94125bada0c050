"""The challenger beside the champion, image by image: which images does only one of the two classify correctly?

The champion's predictions come from the registry, which is nobody's out: so this is no stage of DVC's. The flow writes
the file before the stage `report`, which depends on the folder in which it lies.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from d2r_core import files
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import AttackComparison, Champion, ChampionComparison, RobustnessReport, Weights
from tasks.registry import paired, signing, version_files, versions
from tasks.tracking import errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def compare(settings: Settings, paths: Paths) -> str:
    """Write `reports/champion/comparison.json`: the evaluated target beside the champion; returns a message.

    On the same data with the same evaluation: figures for every attack. Otherwise: a reason, and no figures. Without a
    champion there is no file. Where the target is the champion itself, its last comparison remains. A file about
    another target, other data or another evaluation is always removed. The same inputs give the same bytes.

    Raises:
        UnavailableError: MLflow does not answer.
        UserError: MLflow refuses, or robustness.json cannot be read.
    """
    robustness = RobustnessReport.read(paths.robustness)
    # The report depends on this folder; its owner may have removed everything in reports/.
    paths.comparison.parent.mkdir(parents=True, exist_ok=True)
    if paths.comparison.exists() and not _is_about(paths.comparison, robustness):
        paths.comparison.unlink()
    version = versions.champion(settings, paths)
    if version is None:
        paths.comparison.unlink(missing_ok=True)
        return "There is no champion to compare with."
    from mlflow import MlflowClient

    with errors.readable_errors():
        client = MlflowClient()
        registered = client.get_model_version(settings.promote.model_name, str(version))
        champion = Champion(version=version, weights_sha256=registered.tags.get("weights_sha256"))
        if champion.weights_sha256 == robustness.target.weights_sha256:
            return f"The champion, version {version}, is this very model."
        with tempfile.TemporaryDirectory() as folder:
            public_key = signing.trusted_key(settings, paths)
            result = _compare(registered, paths, robustness, Path(folder), public_key)
    attacks, reason = (None, result) if isinstance(result, str) else (result, None)
    _write(paths.comparison, robustness, champion, attacks, reason)
    if attacks is None:
        return f"Not compared image by image: {reason}"
    worst = attacks["worst"]
    low, high = worst.interval
    return (
        f"Worst case {worst.challenger:.2%}, the champion's (version {version}) {worst.champion:.2%}; "
        f"95 % interval of the difference: {low:+.2%} to {high:+.2%}."
    )


def _is_about(path: Path, robustness: RobustnessReport) -> bool:
    """Whether the comparison at `path` is one of these figures; a damaged one is not."""
    try:
        return ChampionComparison.read(path).identity == robustness.identity
    except UserError:
        return False


def _write(
    path: Path,
    robustness: RobustnessReport,
    champion: Champion,
    attacks: dict[str, AttackComparison] | None,
    reason: str | None,
) -> None:
    identity = robustness.identity
    comparison = ChampionComparison(
        champion=champion,
        challenger=Weights(weights_sha256=identity.weights_sha256),
        data_hash=identity.data_hash,
        evaluation_hash=identity.evaluation_hash,
        attacks=attacks,
        reason=reason,
    )
    content = comparison.model_dump(mode="json")
    del content["attacks" if attacks is None else "reason"]
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def _compare(
    registered: "ModelVersion", paths: Paths, robustness: RobustnessReport, folder: Path, public_key: Path | None
) -> dict[str, AttackComparison] | str:
    """The figures of every attack, or the reason why there are none."""
    try:
        champion, champion_examples = version_files.read(registered, folder, public_key).evaluation()
    except UserError as error:  # the report is made all the same; the gate refuses where it matters
        return str(error)
    name = f"version {registered.version}"
    if champion.data.hash != robustness.data.hash:
        return f"The figures of {name} were measured on other data."
    if champion.settings_hash != robustness.settings_hash:
        return f"The figures of {name} were measured with another seed or other `evaluate` settings."
    pairs = paired.pair(pd.read_parquet(paths.examples), champion_examples, robustness.data.test_images)
    return {
        key: paired.compare_attack(figures.name, pairs[key], robustness.seed)
        for key, figures in robustness.target.attacks.items()
        if key in pairs
    }
