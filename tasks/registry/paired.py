"""Two models' answers to the same images under the same attacks: for the gate and for the report."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from d2r_core.errors import UserError
from d2r_core.evaluation.statistics import paired_bootstrap
from tasks.config.paths import Paths
from tasks.evaluation.report_schema import AttackComparison, RobustnessReport
from tasks.tracking import runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def fetch(client: "MlflowClient", version: "ModelVersion", file: str, folder: str) -> Path | None:
    """Download one file of the run that trained a version; None if it is not there."""
    if not version.run_id or runs.find(client, version.run_id) is None:
        return None
    parent = file.rpartition("/")[0] or None
    if file not in {entry.path for entry in client.list_artifacts(version.run_id, parent)}:
        return None
    return Path(client.download_artifacts(version.run_id, file, folder))


def recorded(
    client: "MlflowClient", version: "ModelVersion", paths: Paths, folder: str
) -> tuple[RobustnessReport, pd.DataFrame] | str:
    """A version's figures and its rows of `examples.parquet`, as its run has them; or why they cannot be had."""
    name = f"version {version.version}"
    report = fetch(client, version, paths.robustness.name, folder)
    examples = fetch(client, version, paths.examples.name, folder)
    if report is None or examples is None:
        return f"The predictions of {name} for each image are not in its run."
    try:
        return RobustnessReport.read(report), pd.read_parquet(examples)
    except (UserError, OSError, ValueError):  # registered by another release, or damaged
        return f"The figures of {name} are in a format that this release does not read."


def pair(challenger: pd.DataFrame, champion: pd.DataFrame, test_images: int) -> dict[str, pd.DataFrame]:
    """For each attack, the images on which both targets were attacked: bool columns `challenger` and `champion`.

    "worst" are the images that withstand every attack that ran on all `test_images`.
    """
    sides = [
        examples.loc[examples["model"] == "target", ["attack", "index", "correct"]].set_index(["attack", "index"])
        for examples in (challenger, champion)
    ]
    both = pd.concat(sides, axis=1, keys=["challenger", "champion"], join="inner").droplevel(1, axis=1)
    pairs = {str(attack): rows.droplevel("attack") for attack, rows in both.groupby("attack", sort=False)}
    on_all = pd.concat([rows for rows in pairs.values() if len(rows) == test_images])
    return {**pairs, "worst": on_all.groupby("index").all()}


def compare_attack(name: str, pairs: pd.DataFrame, seed: int) -> AttackComparison:
    """The figures of one attack, out of the rows that `pair` makes."""
    challenger, champion = tensors(pairs)
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


def tensors(pairs: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """The challenger's and the champion's answers, bool (N,)."""
    challenger, champion = (torch.from_numpy(pairs[side].to_numpy(copy=True)) for side in ("challenger", "champion"))
    return challenger, champion
