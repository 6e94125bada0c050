"""The challenger beside the champion, image by image: which images does only one of the two classify correctly?

The champion's predictions come from the registry, which is nobody's out: so this is no stage of DVC's. The flow writes
the file before the stage `report`, which depends on the folder in which it lies.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from d2r_core import files
from d2r_core.errors import UserError
from d2r_core.evaluation.statistics import paired_bootstrap
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import AttackComparison, Champion, ChampionComparison, RobustnessReport, Weights
from tasks.registry import model_logging, versions
from tasks.registry.status import identity_of
from tasks.tracking import errors, runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
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
            result = _compare(client, registered, paths, robustness, folder)
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
    client: "MlflowClient", registered: "ModelVersion", paths: Paths, robustness: RobustnessReport, folder: str
) -> dict[str, AttackComparison] | str:
    """The figures of every attack, or the reason why there are none."""
    name = f"version {registered.version}"
    champion_report = _fetch(client, registered, paths.robustness.name, folder)
    champion_examples = _fetch(client, registered, paths.examples.name, folder)
    if champion_report is None or champion_examples is None:
        return f"The predictions of {name} for each image are not in its run."
    try:
        champion = RobustnessReport.read(champion_report)
    except UserError:  # registered by another release
        return f"The figures of {name} are in a format that this release does not read."
    if champion.data.hash != robustness.data.hash:
        return f"The figures of {name} were measured on other data."
    if champion.settings_hash != robustness.settings_hash:
        return f"The figures of {name} were measured with another seed or other `evaluate` settings."
    pairs = _pairs(pd.read_parquet(paths.examples), pd.read_parquet(champion_examples), robustness.data.test_images)
    return {
        key: _comparison(figures.name, pairs[key], robustness.seed)
        for key, figures in robustness.target.attacks.items()
        if key in pairs
    }


def _fetch(client: "MlflowClient", version: "ModelVersion", file: str, folder: str) -> Path | None:
    """Download one file of a version's evaluation; None if it is not there."""
    if not version.run_id or runs.find(client, version.run_id) is None:
        return None
    evaluation = model_logging.evaluation_folder(identity_of(version))
    path = f"{evaluation}/{file}"
    if path not in {entry.path for entry in client.list_artifacts(version.run_id, evaluation)}:
        return None
    return Path(client.download_artifacts(version.run_id, path, folder))


def _pairs(challenger: pd.DataFrame, champion: pd.DataFrame, test_images: int) -> dict[str, pd.DataFrame]:
    """For each attack, the images on which both targets were attacked: bool columns `challenger` and `champion`."""
    sides = [
        examples.loc[examples["model"] == "target", ["attack", "index", "correct"]].set_index(["attack", "index"])
        for examples in (challenger, champion)
    ]
    both = pd.concat(sides, axis=1, keys=["challenger", "champion"], join="inner").droplevel(1, axis=1)
    pairs = {str(attack): rows for attack, rows in both.groupby("attack", sort=False)}
    on_all = pd.concat([rows for rows in pairs.values() if len(rows) == test_images])
    return {**pairs, "worst": on_all.groupby("index").all()}


def _comparison(name: str, pairs: pd.DataFrame, seed: int) -> AttackComparison:
    challenger, champion = (torch.from_numpy(pairs[side].to_numpy(copy=True)) for side in ("challenger", "champion"))
    images = len(pairs)
    only_challenger, only_champion = int((challenger & ~champion).sum()), int((~challenger & champion).sum())
    return AttackComparison(
        name=name,
        images=images,
        challenger=int(challenger.sum()) / images,
        champion=int(champion.sum()) / images,
        difference=(only_challenger - only_champion) / images,
        interval=paired_bootstrap(challenger, champion, seed=seed),
        only_challenger=only_challenger,
        only_champion=only_champion,
    )
