"""MLflow runs: where they go, what they hold, how they end, and what a server that is away costs."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run, ViewType

from d2r_core import runtime
from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import runs
from tasks.tracking.lineage import current_lineage
from tasks.training.metrics_log import MetricsLog

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


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # MLflow makes an empty folder `mlruns` wherever it is
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    yield
    mlflow.end_run()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    found.manifest.parent.mkdir(parents=True)
    found.manifest.write_text(json.dumps(MANIFEST))
    return found


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised database in a project of its own."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        runs.configure(with_tracking("sqlite:///mlflow.db"), Paths(root))
    return root / "mlflow.db"


def with_tracking(uri: str, experiment: str = "tests") -> Settings:
    settings = settings_file.load(ROOT / "params.yaml")
    return settings.model_copy(update={"tracking": settings_file.Tracking(uri=uri, experiment=experiment)})


def points(paths: Paths) -> Path:
    return paths.state / "points.jsonl"


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    logged = mlflow.MlflowClient().get_metric_history(run_id, name)
    return [(metric.step, metric.value) for metric in logged]


def logged_runs(experiment: str = "tests") -> list[Run]:
    found = mlflow.MlflowClient().get_experiment_by_name(experiment)
    assert found is not None
    return mlflow.MlflowClient().search_runs([found.experiment_id], run_view_type=ViewType.ALL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_relative_database_lies_in_the_project(paths: Paths, database: Path) -> None:
    assert database.stat().st_size > 0
    assert "MLFLOW_TRACKING_URI" not in os.environ
    runs.configure(with_tracking(f"sqlite:///{database}"), paths)
    experiment = mlflow.MlflowClient().get_experiment_by_name("tests")
    assert experiment is not None
    assert experiment.artifact_location == (database.parent / "mlruns").as_uri()


def test_several_processes_initialise_one_database(paths: Paths) -> None:
    program = (
        "from pathlib import Path\n"
        "from tasks.config import settings\n"
        "from tasks.config.paths import Paths\n"
        "from tasks.tracking import runs\n"
        f"runs.configure(settings.load(Path({str(ROOT / 'params.yaml')!r})), Paths())\n"
        "import mlflow\n"
        "mlflow.MlflowClient().search_registered_models()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///store/mlflow.db"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=paths.root, env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    runs.configure(with_tracking("sqlite:///store/mlflow.db"), paths)
    assert len(mlflow.MlflowClient().search_experiments()) == 3  # MLflow's default, params.yaml's and this test's


def test_variable_wins_over_settings(paths: Paths, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    runs.configure(with_tracking("sqlite:///never.db"), paths)
    assert mlflow.get_tracking_uri() == f"sqlite:///{database}"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{database}"
    assert not (paths.root / "never.db").exists()


def test_second_project_does_not_inherit_the_first_ones_database(paths: Paths, database: Path) -> None:
    shutil.copy(database, paths.root / "other.db")
    runs.configure(with_tracking(f"sqlite:///{database}"), paths)
    runs.configure(with_tracking("sqlite:///other.db"), paths)
    assert mlflow.get_tracking_uri() == f"sqlite:///{paths.root / 'other.db'}"


def test_run_holds_settings_data_and_lineage(paths: Paths, database: Path) -> None:
    settings = with_tracking(f"sqlite:///{database}", "holds")
    progress = MetricsLog("train", 2, points(paths), show=False)
    with runs.training_run(settings, paths, "train", progress.path) as training:
        progress.log_step({"loss": 3.0}, 1, 2, 5)
        progress.log_epoch({"loss": 2.5, "clean_accuracy": 0.25}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 5)
        progress.log_epoch({"loss": 1.5, "clean_accuracy": 0.5}, 2)

    (run,) = logged_runs("holds")
    assert run.info.run_id == training.id
    assert run.info.run_name == "train digits"
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in settings.flat().items()}
    made_from = current_lineage(settings, paths)
    expected = {
        "stage": "train",
        "git_commit": made_from.git_commit,
        "git_dirty": str(made_from.git_dirty).lower(),
        "data_hash": MANIFEST["hash"],
        "settings_hash": made_from.settings_hash,
    }
    assert run.data.tags.items() >= expected.items()
    assert run.data.tags["d2r_version"]
    assert history(training.id, "loss") == [(1, 2.5), (2, 1.5)]
    assert history(training.id, "clean_accuracy") == [(1, 0.25), (2, 0.5)]
    assert history(training.id, "step/loss") == [(2, 3.0), (6, 2.0)]
    assert run.data.metrics.keys() == {"loss", "clean_accuracy", "step/loss"}  # on a CPU nothing of the machine
    rows = [json.loads(line) for line in progress.path.read_text().splitlines()]
    logged = mlflow.MlflowClient().get_metric_history(training.id, "loss")
    assert [metric.timestamp for metric in logged] == [int(row["time"] * 1000) for row in rows if "step" not in row]

    assert run.inputs is not None
    (given,) = run.inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    assert given.dataset.name == "digits"
    assert given.dataset.digest == MANIFEST["hash"][:36]
    assert json.loads(given.dataset.profile or "")["splits"] == MANIFEST["splits"]
    assert mlflow.data.get_source(given.dataset).to_dict() == {"uri": str(paths.prepared)}


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("the loss is NaN"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(3), "FAILED")],
)
def test_run_ends_as_the_training_did(paths: Paths, database: Path, error: BaseException, status: str) -> None:
    settings = with_tracking(f"sqlite:///{database}", status + type(error).__name__)
    with pytest.raises(type(error)) as caught, runs.training_run(settings, paths, "pretrain", points(paths)):
        raise error
    assert caught.value is error
    (run,) = logged_runs(settings.tracking.experiment)
    assert run.info.status == status
    assert mlflow.active_run() is None


def test_training_outlives_a_database_that_fails(
    paths: Paths, database: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FINISH_SECONDS", 1.0)
    shutil.copy(database, paths.root / "gone.db")
    progress = MetricsLog("train", 7, points(paths), show=False)
    with (
        caplog.at_level(logging.WARNING, "tasks"),
        runs.training_run(with_tracking("sqlite:///gone.db"), paths, "train", progress.path),
    ):
        (paths.root / "gone.db").write_bytes(b"")  # every table is gone
        progress.log_epoch({"loss": 1.0}, 7)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tasks.")]
    assert len(messages) == 3
    assert messages[0].startswith("MLflow does not take points at present (")
    assert (
        messages[1] == "MLflow does not have 1 points of this training yet; they are sent when the model is registered."
    )
    assert messages[2].startswith("MLflow could not end the run as FINISHED: ")


def test_training_that_was_killed_continues_its_run(paths: Paths, database: Path) -> None:
    settings = with_tracking(f"sqlite:///{database}", "continues")
    program = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from tasks.config import settings\n"
        "from tasks.config.paths import Paths\n"
        "from tasks.tracking import metric_uploader, runs\n"
        "from tasks.training.metrics_log import MetricsLog\n"
        f"loaded = settings.Settings.model_validate_json({settings.model_dump_json(by_alias=True)!r})\n"
        f"progress = MetricsLog('train', 2, Path({str(points(paths))!r}), show=False)\n"
        "with runs.training_run(loaded, Paths(), 'train', progress.path):\n"
        "    progress.log_step({'loss': 4.0}, 1, 1, 2)\n"
        "    progress.log_epoch({'loss': 3.0}, 1)\n"
        "    while metric_uploader.read_note(progress.path).offset < progress.path.stat().st_size:\n"
        "        time.sleep(0.05)\n"
        "    progress.log_step({'loss': 2.0}, 2, 1, 2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], cwd=paths.root, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    runs.configure(settings, paths)
    (run,) = logged_runs("continues")
    assert run.info.status == "RUNNING"
    assert [history(run.info.run_id, name) for name in ("loss", "step/loss")] == [[(1, 3.0)], [(1, 4.0)]]

    # It continues from the end of epoch 1, and repeats what it had not saved.
    progress = MetricsLog("train", 2, points(paths), show=False)
    with runs.training_run(settings, paths, "train", progress.path) as training:
        progress.log_epoch({"loss": 3.0}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 2)
        progress.log_epoch({"loss": 1.0}, 2)
    (continued,) = logged_runs("continues")
    assert training.id == continued.info.run_id == run.info.run_id
    assert continued.info.status == "FINISHED"
    assert history(training.id, "loss") == [(1, 3.0), (2, 1.0)]
    assert history(training.id, "step/loss") == [(1, 4.0), (3, 2.0)]


def test_continued_training_whose_run_was_deleted_gets_a_new_one(paths: Paths, database: Path) -> None:
    settings = with_tracking(f"sqlite:///{database}", "deleted run")
    progress = MetricsLog("train", 2, points(paths), show=False)
    with runs.training_run(settings, paths, "train", progress.path) as first:
        progress.log_epoch({"loss": 3.0}, 1)
    mlflow.MlflowClient().delete_run(first.id)
    with runs.training_run(settings, paths, "train", progress.path) as second:
        progress.log_epoch({"loss": 1.0}, 2)
    assert second.id != first.id
    assert history(second.id, "loss") == [(1, 3.0), (2, 1.0)]


def test_gpu_is_watched(paths: Paths, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setattr(runtime, "device", lambda name: torch.device("cuda"))
    progress = MetricsLog("train", 2, points(paths), show=False)
    settings = with_tracking(f"sqlite:///{database}", "watched")
    epoch = 0
    for _ in range(2):  # continued, it goes on where it was
        with runs.training_run(settings, paths, "train", progress.path) as training:
            before = history(training.id, "system/system_memory_usage_percentage")
            deadline = time.monotonic() + 20
            while history(training.id, "system/system_memory_usage_percentage") == before:
                assert time.monotonic() < deadline
                epoch += 1
                progress.log_epoch({"loss": 1.0}, epoch)
                time.sleep(0.2)
    steps = [step for step, _ in history(training.id, "system/system_memory_usage_percentage")]
    assert steps == list(range(len(steps)))
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())


def test_other_ranks_track_nothing() -> None:
    with runs.silent() as training:
        assert training.id == ""


def test_absent_server_is_one_message_within_seconds(paths: Paths) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with (
        pytest.raises(
            runs.UnavailableError, match=rf"^MLflow at {uri} does not answer \(.*refused\)\. .*when it begins or"
        ),
        runs.training_run(with_tracking(uri), paths, "train", points(paths)),
    ):
        pytest.fail("the training must not begin")
    assert time.monotonic() - started < 30


def test_server_that_accepts_and_says_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(runs.UnavailableError, match="does not answer"):
            runs.configure(with_tracking(uri), paths)


def test_file_that_is_no_database(paths: Paths) -> None:
    (paths.root / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(UserError, match=r"mlflow\.db: cannot be used as MLflow's database .* Move it away"):
        runs.configure(with_tracking("sqlite:///mlflow.db"), paths)


def test_folder_that_cannot_be_made(paths: Paths) -> None:
    (paths.root / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used as MLflow's database"):
        runs.configure(with_tracking("sqlite:///file/mlflow.db"), paths)


def test_address_of_an_unknown_kind(paths: Paths) -> None:
    with pytest.raises(UserError, match="MLflow at nonsense://here refuses"):
        runs.configure(with_tracking("nonsense://here"), paths)


def test_deleted_experiment_says_how_to_restore_it(paths: Paths, database: Path) -> None:
    settings = with_tracking(f"sqlite:///{database}", "deleted")
    runs.configure(settings, paths)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("deleted")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match=r"'deleted' is deleted.*mlflow experiments restore"):
        runs.configure(settings, paths)
