"""A project with prepared data and an empty MLflow database, and what MLflow has of its runs."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run, ViewType

from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import connection

ROOT = Path(__file__).parents[3]
MANIFEST: dict[str, Any] = {
    "source": "digits",
    "path": None,
    "classes": ["even", "odd"],
    "image_size": 16,
    "channels": 3,
    "splits": {name: {"images": 4, "per_class": [2, 2]} for name in ("train", "validation", "test")},
    "hash": "ab" * 32,
    "converted": {"grey": 4, "resized": 4},
}


@contextmanager
def tracked_project(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """The project, which becomes the current folder, with an environment that says nothing of MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow makes an empty folder `mlruns` in the current one
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
            patch.delenv(name, raising=False)
        shutil.copy(_empty_database(tmp_path_factory.getbasetemp() / "empty"), folder / "mlflow.db")
        paths = Paths(folder)
        paths.manifest.parent.mkdir(parents=True)
        paths.manifest.write_text(json.dumps(MANIFEST))
        yield paths
        mlflow.end_run()


@functools.cache
def _empty_database(folder: Path) -> Path:
    """Made once, since it takes seconds, and only ever copied."""
    connection.configure(settings_for(), Paths(folder))
    return folder / "mlflow.db"


def settings_for(uri: str = "sqlite:///mlflow.db", experiment: str = "tests") -> Settings:
    """Those of params.yaml with this tracking server."""
    settings = settings_file.load(ROOT / "params.yaml")
    return settings.model_copy(update={"tracking": settings_file.Tracking(uri=uri, experiment=experiment)})


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    """A metric's steps and values."""
    return [(metric.step, metric.value) for metric in mlflow.MlflowClient().get_metric_history(run_id, name)]


def logged_points(run_id: str) -> Counter[tuple[str, int, float]]:
    """Name, step and value of all the training's metrics."""
    names = {name for name in mlflow.get_run(run_id).data.metrics if not name.startswith("system/")}
    return Counter((name, step, value) for name in names for step, value in history(run_id, name))


def all_runs() -> list[Run]:
    """All runs of the experiment "tests", the oldest first."""
    experiment = mlflow.MlflowClient().get_experiment_by_name("tests")
    assert experiment is not None
    order = ["attributes.start_time ASC"]
    return list(
        mlflow.MlflowClient().search_runs([experiment.experiment_id], run_view_type=ViewType.ALL, order_by=order)
    )


def only_run() -> Run:
    """The one training of the experiment "tests", without the run of its pass of the chain."""
    (run,) = (run for run in all_runs() if run.data.tags["stage"] != "chain")
    return run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The project's own warnings."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("tasks.")]
