"""The challenger beside the champion, image by image: who is right where the other is wrong.

The champion's answers come from the registry, which is nobody's out: so this is no stage of DVC's. The flow writes the
file before the stage `report`, which depends on the folder in which it lies.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from d2r_core import files
from d2r_core.evaluation.statistics import paired_bootstrap
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import versions
from tasks.tracking import errors, runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def compare(settings: Settings, paths: Paths) -> str:
    """Write `reports/champion/comparison.json`: the evaluated target beside the champion; returns what there is to say.

    On the same data with the same evaluation: figures for every attack. Otherwise: a reason, and no figures. Without a
    champion there is no file. Where the target is the champion itself, what it was compared with before that stays.
    A file about another target, other data or another evaluation never stays. The same inputs give the same bytes.

    Raises:
        UnavailableError: MLflow does not answer.
        UserError: MLflow refuses.
    """
    robustness = _json(paths.robustness)
    about = {
        "challenger": {"weights_sha256": robustness["models"]["target"]["weights_sha256"]},
        "data_hash": robustness["data"]["hash"],
        "evaluation_hash": robustness["settings_hash"],
    }
    # The report depends on this folder; its owner may have removed everything in reports/.
    paths.comparison.parent.mkdir(parents=True, exist_ok=True)
    if paths.comparison.exists():
        try:
            lies_here = _json(paths.comparison)
            belongs = all(lies_here[key] == value for key, value in about.items())
        except (ValueError, KeyError, TypeError):
            belongs = False  # damaged
        if not belongs:
            paths.comparison.unlink()
    version = versions.champion(settings, paths)
    if version is None:
        paths.comparison.unlink(missing_ok=True)
        return "There is no champion to compare with."
    from mlflow import MlflowClient

    with errors.readable_errors():
        client = MlflowClient()
        holder = client.get_model_version(settings.promote.model_name, str(version))
        champion = {"version": version, "weights_sha256": holder.tags.get("weights_sha256")}
        if champion["weights_sha256"] == about["challenger"]["weights_sha256"]:
            return f"The champion, version {version}, is this very model."
        with tempfile.TemporaryDirectory() as folder:
            found = _beside(client, holder, paths, robustness, folder)
    files.write_text(paths.comparison, json.dumps({"champion": champion, **about, **found}, indent=2) + "\n")
    if "reason" in found:
        return f"Not compared image by image: {found['reason']}"
    worst = found["attacks"]["worst"]
    low, high = worst["interval"]
    return (
        f"Worst case {worst['challenger']:.2%}, the champion's (version {version}) {worst['champion']:.2%}; "
        f"95 % interval of the difference: {low:+.2%} to {high:+.2%}."
    )


def _beside(
    client: "MlflowClient", holder: "ModelVersion", paths: Paths, robustness: dict[str, Any], folder: str
) -> dict[str, Any]:
    """{"attacks": figures}, or {"reason": why there are none}."""
    named = f"version {holder.version}"
    figures_there = _fetch(client, holder, paths.robustness.name, folder)
    examples_there = _fetch(client, holder, paths.examples.name, folder)
    if figures_there is None or examples_there is None:
        return {"reason": f"What {named} said of each image is not in its run."}
    # Out of the run's file, not of the version's tags: one run may have been evaluated several times.
    champion = _json(figures_there)
    if champion["data"]["hash"] != robustness["data"]["hash"]:
        return {"reason": f"The figures of {named} were measured on other data."}
    if champion["settings_hash"] != robustness["settings_hash"]:
        return {"reason": f"The figures of {named} were measured with another seed or other `evaluate` settings."}
    pairs = _pairs(pd.read_parquet(paths.examples), pd.read_parquet(examples_there), robustness["data"]["test_images"])
    figures = robustness["models"]["target"]["attacks"]
    return {
        "attacks": {
            key: {"name": figures[key]["name"], **_compared(pairs[key], robustness["seed"])}
            for key in figures
            if key in pairs
        }
    }


def _fetch(client: "MlflowClient", version: "ModelVersion", file: str, folder: str) -> Path | None:
    """Download one file of the run that trained a version; None if it is not there."""
    if not version.run_id or runs.find(client, version.run_id) is None:
        return None
    if file not in {found.path for found in client.list_artifacts(version.run_id)}:
        return None
    return Path(client.download_artifacts(version.run_id, file, folder))


def _pairs(challenger: pd.DataFrame, champion: pd.DataFrame, test_images: int) -> dict[str, pd.DataFrame]:
    """For each attack, the images that met both targets under it: bool columns `challenger` and `champion`."""
    sides = [
        examples.loc[examples["model"] == "target", ["attack", "index", "correct"]].set_index(["attack", "index"])
        for examples in (challenger, champion)
    ]
    both = pd.concat(sides, axis=1, keys=["challenger", "champion"], join="inner").droplevel(1, axis=1)
    pairs = {str(attack): found for attack, found in both.groupby("attack", sort=False)}
    on_all = pd.concat([found for found in pairs.values() if len(found) == test_images])
    return {**pairs, "worst": on_all.groupby("index").all()}


def _compared(pairs: pd.DataFrame, seed: int) -> dict[str, Any]:
    challenger, champion = (torch.from_numpy(pairs[side].to_numpy(copy=True)) for side in ("challenger", "champion"))
    images = len(pairs)
    only_challenger, only_champion = int((challenger & ~champion).sum()), int((~challenger & champion).sum())
    return {
        "images": images,
        "challenger": int(challenger.sum()) / images,
        "champion": int(champion.sum()) / images,
        "difference": (only_challenger - only_champion) / images,
        "interval": paired_bootstrap(challenger, champion, seed=seed),
        "only_challenger": only_challenger,
        "only_champion": only_champion,
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
