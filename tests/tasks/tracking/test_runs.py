"""MLflow runs: what they hold, how they end, and how a training continues its own."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.entities import Run
from mlflow_server import free_port
from tracked_project import MANIFEST, ROOT, all_runs, history, only_run, settings_for, tracked_project, warnings

from d2r_core import runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import chain_runs, connection, errors, runs
from tasks.tracking.lineage import current_lineage
from tasks.training.metrics_log import MetricsLog

MEMORY = "system/system_memory_usage_percentage"


@pytest.fixture
def paths(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    with tracked_project(tmp_path, tmp_path_factory) as paths:
        yield paths


@pytest.fixture
def points(paths: Paths) -> Path:
    return paths.state / "points.jsonl"


def test_run_holds_settings_data_and_lineage(paths: Paths, points: Path) -> None:
    settings = settings_for()
    with runs.training_run(settings, paths, "train", points) as training:
        pass
    run = only_run()
    assert run.info.run_id == training.id
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in settings.flat().items()}
    lineage = current_lineage(settings, paths)
    expected = {
        "stage": "train",
        "git_commit": lineage.git_commit,
        "git_dirty": str(lineage.git_dirty).lower(),
        "data_hash": MANIFEST["hash"],
        "settings_hash": lineage.settings_hash,
    }
    assert run.data.tags.items() >= expected.items()
    assert run.data.tags["d2r_version"]
    assert run.inputs is not None
    (logged,) = run.inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    assert logged.dataset.name == "digits"
    assert logged.dataset.digest == MANIFEST["hash"][:36]
    assert json.loads(logged.dataset.profile or "")["splits"] == MANIFEST["splits"]
    assert mlflow.data.get_source(logged.dataset).to_dict() == {"uri": str(paths.prepared)}


def test_run_holds_the_points_of_the_training(paths: Paths, points: Path) -> None:
    progress = MetricsLog("train", 2, points, show=False)
    with runs.training_run(settings_for(), paths, "train", points) as training:
        progress.log_step({"loss": 3.0}, 1, 2, 5)
        progress.log_epoch({"loss": 2.5, "clean_accuracy": 0.25}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 5)
        progress.log_epoch({"loss": 1.5, "clean_accuracy": 0.5}, 2)
    assert history(training.id, "loss") == [(1, 2.5), (2, 1.5)]
    assert history(training.id, "clean_accuracy") == [(1, 0.25), (2, 0.5)]
    assert history(training.id, "step/loss") == [(2, 3.0), (6, 2.0)]
    # Nothing of the machine on a CPU.
    assert only_run().data.metrics.keys() == {"loss", "clean_accuracy", "step/loss"}
    rows = [json.loads(line) for line in points.read_text().splitlines()]
    logged = mlflow.MlflowClient().get_metric_history(training.id, "loss")
    assert [metric.timestamp for metric in logged] == [int(row["time"] * 1000) for row in rows if "step" not in row]


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("the loss is NaN"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(3), "FAILED")],
)
def test_run_ends_as_the_training_did(paths: Paths, points: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)) as caught, runs.training_run(settings_for(), paths, "pretrain", points):
        raise error
    assert caught.value is error
    assert only_run().info.status == status
    assert mlflow.active_run() is None


def test_training_outlives_a_database_that_fails(
    paths: Paths, points: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FINISH_SECONDS", 1.0)
    progress = MetricsLog("train", 7, points, show=False)
    with (
        caplog.at_level(logging.WARNING, "tasks"),
        runs.training_run(settings_for(), paths, "train", points),
    ):
        (paths.root / "mlflow.db").write_bytes(b"")  # every table is gone
        progress.log_epoch({"loss": 1.0}, 7)
    away, unconfirmed, not_ended = warnings(caplog)
    assert away.startswith("MLflow does not take points at present (")
    assert unconfirmed == (
        "MLflow has not confirmed 1 points of this training; missing ones are sent when the model is registered."
    )
    assert not_ended.startswith("MLflow could not end the run as FINISHED: ")


@pytest.mark.slow
def test_training_that_was_killed_continues_its_run(paths: Paths, points: Path) -> None:
    settings = settings_for()
    program = (
        "import mlflow, os, signal, time\n"
        "from pathlib import Path\n"
        "from tasks.config import settings\n"
        "from tasks.config.paths import Paths\n"
        "from tasks.tracking import runs\n"
        "from tasks.training.metrics_log import MetricsLog\n"
        f"loaded = settings.Settings.model_validate_json({settings.model_dump_json(by_alias=True)!r})\n"
        f"progress = MetricsLog('train', 2, Path({str(points)!r}), show=False)\n"
        "with runs.training_run(loaded, Paths(), 'train', progress.path) as run:\n"
        "    progress.log_step({'loss': 4.0}, 1, 1, 2)\n"
        "    progress.log_epoch({'loss': 3.0}, 1)\n"
        "    while mlflow.get_run(run.id).data.metrics.keys() < {'loss', 'step/loss'}:\n"
        "        time.sleep(0.05)\n"
        "    progress.log_step({'loss': 2.0}, 2, 1, 2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], cwd=paths.root, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    connection.configure(settings, paths)
    run = only_run()
    assert run.info.status == "RUNNING"
    assert [history(run.info.run_id, name) for name in ("loss", "step/loss")] == [[(1, 3.0)], [(1, 4.0)]]

    # It continues from the end of epoch 1, and repeats what it had not saved.
    progress = MetricsLog("train", 2, points, show=False)
    with runs.training_run(settings, paths, "train", points) as training:
        progress.log_epoch({"loss": 3.0}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 2)
        progress.log_epoch({"loss": 1.0}, 2)
    continued = only_run()
    assert training.id == continued.info.run_id == run.info.run_id
    assert continued.info.status == "FINISHED"
    assert history(training.id, "loss") == [(1, 3.0), (2, 1.0)]
    assert history(training.id, "step/loss") == [(1, 4.0), (3, 2.0)]


def test_continued_training_whose_run_was_deleted_gets_a_new_one(paths: Paths, points: Path) -> None:
    progress = MetricsLog("train", 2, points, show=False)
    with runs.training_run(settings_for(), paths, "train", points) as first:
        progress.log_epoch({"loss": 3.0}, 1)
    mlflow.MlflowClient().delete_run(first.id)
    with runs.training_run(settings_for(), paths, "train", points) as second:
        progress.log_epoch({"loss": 1.0}, 2)
    assert second.id != first.id
    assert history(second.id, "loss") == [(1, 3.0), (2, 1.0)]


def test_gpu_is_monitored(paths: Paths, points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setattr(runtime, "device", lambda name: torch.device("cuda"))
    progress = MetricsLog("train", 2, points, show=False)
    epoch = 0
    for _ in range(2):  # continued, it goes on where it was
        with runs.training_run(settings_for(), paths, "train", points) as training:
            before = history(training.id, MEMORY)
            deadline = time.monotonic() + 20
            while history(training.id, MEMORY) == before:
                assert time.monotonic() < deadline
                epoch += 1
                progress.log_epoch({"loss": 1.0}, epoch)
                time.sleep(0.2)
    steps = [step for step, _ in history(training.id, MEMORY)]
    assert steps == list(range(len(steps)))
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())


def test_other_ranks_track_nothing() -> None:
    with runs.silent() as training:
        assert training.id == ""


def test_absent_server_is_one_message_within_seconds(paths: Paths, points: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    message = rf"^MLflow at {uri} does not answer \(.*refused\)\. .*when it begins or"
    started = time.monotonic()
    with (
        pytest.raises(errors.UnavailableError, match=message),
        runs.training_run(settings_for(uri), paths, "train", points),
    ):
        pytest.fail("the training must not begin")
    assert time.monotonic() - started < 30


def parents() -> list[Run]:
    """The runs of passes of the chain, the oldest first."""
    return [run for run in all_runs() if run.data.tags["stage"] == "chain"]


def train_stage(settings: Settings, paths: Paths, stage: str) -> Run:
    """A training that ends well, with a fresh file of points; its run."""
    points = paths.state / stage / "points.jsonl"
    shutil.rmtree(points.parent, ignore_errors=True)
    with runs.training_run(settings, paths, stage, points) as training:
        MetricsLog(stage, 1, points, show=False).log_epoch({"loss": 1.0}, 1)
    return mlflow.get_run(training.id)


def test_pretrain_and_train_of_a_pass_have_one_parent(paths: Paths) -> None:
    settings = settings_for()
    children = [train_stage(settings, paths, stage) for stage in ("pretrain", "train", "train")]
    (parent,) = parents()
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    assert [child.info.run_name for child in children[:2]] == [
        f"pretrain {day} digits standard",
        f"train {day} digits d2r",
    ]
    assert parent.info.run_name == f"chain {day} digits d2r"
    assert parent.info.status == "FINISHED"
    lineage = current_lineage(settings, paths)
    assert parent.data.tags.items() >= {"data_hash": MANIFEST["hash"], "settings_hash": lineage.settings_hash}.items()


def test_other_settings_or_data_are_another_pass(paths: Paths) -> None:
    settings = settings_for()
    train_stage(settings, paths, "train")
    train_stage(settings.model_copy(update={"seed": 1}), paths, "train")
    own = {"source": "image_folder", "path": "data/raw/flowers", "hash": "cd" * 32}
    paths.manifest.write_text(json.dumps({**MANIFEST, **own}))
    run = train_stage(settings, paths, "train")
    assert len(parents()) == 3
    assert run.info.run_name is not None
    assert run.info.run_name.endswith(" flowers d2r")


@pytest.mark.parametrize(("error", "status"), [(UserError("NaN"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_the_parent_ends_as_its_training_and_goes_on_with_it(
    paths: Paths, points: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), runs.training_run(settings_for(), paths, "train", points):
        raise error
    assert [run.info.status for run in parents()] == [status]
    with runs.training_run(settings_for(), paths, "train", points):
        assert [run.info.status for run in parents()] == ["RUNNING"]
    assert [run.info.status for run in parents()] == ["FINISHED"]
    assert len(all_runs()) == 2


def test_trainings_that_begin_at_once_share_a_parent(paths: Paths) -> None:
    settings = settings_for()
    lineage = current_lineage(settings, paths)
    connection.configure(settings, paths)
    experiment = mlflow.MlflowClient().get_experiment_by_name("tests")
    assert experiment is not None

    def find(_: int) -> str:
        return chain_runs.find_or_create(mlflow.MlflowClient(), experiment.experiment_id, lineage, "chain", {})

    with ThreadPoolExecutor(4) as threads:
        parent_ids = set(threads.map(find, range(4)))
    assert len(parent_ids) == 1
    active = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    assert [run.info.run_id for run in active] == list(parent_ids)
