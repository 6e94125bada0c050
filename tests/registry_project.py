"""A project for the tests of the registry: made-up figures, real weights, a real sqlite store."""

import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import robustness_json
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from d2r_core import checkpoint, data, models
from d2r_core.data import Split
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.registry import gate, moves, status, versions
from tasks.tracking import connection, runs
from tasks.tracking.lineage import current_lineage
from tasks.training.metrics_log import MetricsLog

NAME = "digits"
CLASSES = [f"digit {label}" for label in range(10)]
HISTORY = "epoch,loss,clean_accuracy,robust_accuracy\n1,2.5,0.5,0.25\n2,1.5,0.75,0.5\n"
PASSED = {"key": "large_eps", "name": "A large eps fools every image", "passed": True, "found": "0 of 100 are robust."}
ARCHITECTURE: dict[str, Any] = {
    "name": "wide_resnet",
    "depth": 10,
    "widen_factor": 1,
    "num_classes": 10,
    "image_size": 16,
}


class Project:
    """A checkout whose stages have run: the artifacts are made by hand, the weights and the store are real."""

    def __init__(self, paths: Paths, tiny_settings: Callable[..., Settings]) -> None:
        self.paths, self._tiny_settings = paths, tiny_settings
        self.settings = self.with_settings()
        self.prepare()
        documents = (paths.report, paths.model_card, paths.data_page, paths.validation / "index.html", paths.params)
        for path in (*documents, paths.comparison):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        paths.dvc_lock.write_text("schema: '2.0'")
        paths.pretrain_history.write_text("epoch,loss\n")
        paths.train_history.write_text(HISTORY)

    def with_settings(self, **changes: Any) -> Settings:
        """From now on, the settings of these tests with other values."""
        # 20 images that agree on everything show a difference of less than 12 points at best.
        changes["promote"] = {"model_name": NAME, "margin": 0.15, **changes.get("promote", {})}
        tracking = {"uri": "sqlite:///mlflow.db", "experiment": "tests"}
        self.settings = self._tiny_settings(tracking=tracking, **changes)
        return self.settings

    def prepare(self, seed: int = 0, labels: torch.Tensor | None = None) -> None:
        """New data; with the given labels of the test images, or each class twice."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator)
        test = Split(images, torch.arange(10).repeat(2) if labels is None else labels)
        self._save({"train": Split(255 - images, test.labels), "test": test})

    def replace_test_images(self, images: torch.Tensor) -> None:
        """The first test images become these."""
        train, test = (data.load_split(self.paths.prepared / f"{name}.safetensors") for name in ("train", "test"))
        self._save({"train": train, "test": Split(torch.cat([images, test.images[len(images) :]]), test.labels)})

    def _save(self, splits: dict[str, Split]) -> None:
        for name, split in splits.items():
            data.save_split(self.paths.prepared / f"{name}.safetensors", split)
        manifest = {
            "source": "digits",
            "path": None,
            "classes": CLASSES,
            "image_size": 16,
            "splits": {name: {"images": 20, "per_class": [2] * 10} for name in splits},
            "hash": data.content_hash(splits),
        }
        self.paths.manifest.write_text(json.dumps(manifest))
        self.paths.accepted.parent.mkdir(parents=True, exist_ok=True)
        self.paths.accepted.write_text(json.dumps({"data_hash": manifest["hash"]}))

    def train(self, seed: int = 0, classes: list[str] = CLASSES, collapsed: bool = False) -> torch.nn.Module:
        """A target model with that seed's random weights, out of an MLflow run that logged the first of two epochs."""
        torch.manual_seed(seed)
        model = models.build(**ARCHITECTURE).eval()
        progress = MetricsLog("train", 2, self.paths.state / str(time.time()) / "metrics.jsonl", show=False)
        with runs.training_run(self.settings, self.paths, "train", progress.path) as run:
            progress.log_epoch({"loss": 2.5, "clean_accuracy": 0.5, "robust_accuracy": 0.25}, 1)
        metadata = {
            "architecture": ARCHITECTURE,
            "classes": classes,
            "image_range": [0.0, 1.0],
            "collapsed": collapsed,
            **vars(current_lineage(self.settings, self.paths)),
            "mlflow_run_id": run.id,
        }
        checkpoint.save(self.paths.target, model, metadata)
        return model

    def evaluate(
        self,
        clean: float = 0.95,
        worst: float = 0.6,
        autoattack: float | None = None,
        checks: tuple[dict[str, object], ...] = (PASSED,),
    ) -> None:
        """Figures, answers to each image and self-checks of the target model, with the present settings and data.

        The images with the lowest numbers are correct, so that of two models one is correct wherever the other is.
        """
        figures = {
            "clean": robustness_json.figures("clean", clean, 20, eps=0.0),
            "worst": robustness_json.figures("worst", worst, 20, eps=0.1),
        }
        if autoattack is not None:
            figures["autoattack"] = robustness_json.figures("AutoAttack standard", autoattack, 10)
        weights = checkpoint.read_metadata(self.paths.target)["weights_sha256"]
        content = robustness_json.content(
            {
                "target": robustness_json.model(weights, figures, checks),
                "guidance": robustness_json.model("0", {"clean": robustness_json.figures("clean", 0.98, 50)}),
            },
            data=read_manifest(self.paths)["hash"],
            settings_hash=self.settings.hash("seed", "evaluate"),
        )
        robustness_json.write(self.paths.robustness, content)
        labels = data.load_split(self.paths.prepared / "test.safetensors").labels
        frames = []
        for attack, accuracy, count in (("clean", clean, 20), ("pgd", worst, 20), ("autoattack", autoattack, 10)):
            if accuracy is not None:
                index = np.arange(count)
                columns = {"attack": attack, "index": index, "label": labels[:count].numpy()}
                frames.append(pd.DataFrame({**columns, "correct": index < round(accuracy * count)}))
        pd.concat(frames).assign(model="target").to_parquet(self.paths.examples)

    def register(self, seed: int = 0, **figures: Any) -> int:
        self.train(seed)
        self.evaluate(**figures)
        return self.register_present()

    def register_present(self) -> int:
        """Register what was trained and evaluated last."""
        return versions.register(self.settings, self.paths)

    def judge(self, version: int) -> gate.Verdict:
        return gate.judge(self.settings, self.paths, version)

    def promote(self, version: int, force: bool = True) -> bool:
        """By hand, and whatever the gate says."""
        return moves.promote(
            self.settings, self.paths, version, who="tester@host", command="promote", reason="test", force=force
        )

    def rollback(self, to: int | None = None) -> moves.Rollback:
        return moves.rollback(self.settings, self.paths, who="tester@host", reason="It fails in production.", to=to)

    def history(self) -> list[tuple[int | None, int]]:
        """From which version to which, oldest first."""
        entries = status.read_history(self.settings, self.paths)
        return [(entry.move.from_version, entry.move.to_version) for entry in entries]

    def champion(self) -> int | None:
        return versions.champion(self.settings, self.paths)

    def version(self, version: int) -> ModelVersion:
        return mlflow.MlflowClient().get_model_version(NAME, str(version))

    def versions(self) -> list[int]:
        registered = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
        return sorted(int(version.version) for version in registered)

    def challenger(self) -> int:
        return int(mlflow.MlflowClient().get_model_version_by_alias(NAME, "challenger").version)

    def runs(self) -> list[Run]:
        """The trainings, without the runs of their passes of the chain."""
        every = mlflow.search_runs(experiment_names=["tests"], output_format="list")
        return [run for run in every if run.data.tags["stage"] != "chain"]


def make_project(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """A project in `folder`, which becomes the current one, with an empty store."""
    copy_store(folder, tmp_path_factory, tiny_settings, monkeypatch)
    return Project(Paths(folder), tiny_settings)


def copy_store(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An initialised database with the experiment "tests" as `folder`/mlflow.db; `folder` becomes the current one."""
    monkeypatch.chdir(folder)  # MLflow makes an empty folder `mlruns` wherever it is
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = tiny_settings(tracking={"uri": "sqlite:///mlflow.db", "experiment": "tests"})
    shutil.copy(_empty_store(tmp_path_factory.getbasetemp() / "store", settings), folder / "mlflow.db")


@functools.cache
def _empty_store(folder: Path, settings: Settings) -> Path:
    """Made once, since it takes seconds, and only ever copied."""
    connection.configure(settings, Paths(folder))
    return folder / "mlflow.db"


def logged_model_folder(version: ModelVersion) -> Path:
    """Where the local store keeps the files of a version's logged model."""
    location = mlflow.get_logged_model(str(version.source).removeprefix("models:/")).artifact_location
    return Path(location.removeprefix("file://"))


def files_of(run_id: str, folder: str = "") -> set[str]:
    return {entry.path for entry in mlflow.MlflowClient().list_artifacts(run_id, folder)}


def images(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).random((count, 3, 16, 16), dtype=np.float32)


def logits(model: torch.nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        output: npt.NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
    return output
