"""A training's points reach a real MLflow server that is killed, away, slow or back, each of them once."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow_server import Proxy, Server
from tracked_project import history, logged_points, settings_for, tracked_project, warnings

from d2r_core import runtime
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import model_logging
from tasks.tracking import metric_uploader, runs
from tasks.training.metrics_log import MetricsLog

STEPS = 4  # of an epoch in these tests


class Training:
    """What a training reports, without the training."""

    def __init__(self, paths: Paths) -> None:
        self.progress = MetricsLog("train", 100, paths.state / "training/metrics.jsonl", show=False)
        self.path, self.epoch, self.longest = self.progress.path, 0, 0.0

    def epochs(self, count: int) -> None:
        for _ in range(count):
            self.epoch += 1
            started = time.monotonic()
            for step in range(1, STEPS + 1):
                self.progress.log_step({"loss": 1 / step, "ce": float(step)}, self.epoch, step, STEPS)
            self.progress.log_epoch({"loss": 1 / self.epoch, "robust_accuracy": 0.5}, self.epoch)
            self.longest = max(self.longest, time.monotonic() - started)

    def points(self) -> Counter[tuple[str, int, float]]:
        """What the server must have of it, each once."""
        ends = {("loss", epoch, 1 / epoch) for epoch in range(1, self.epoch + 1)}
        ends |= {("robust_accuracy", epoch, 0.5) for epoch in range(1, self.epoch + 1)}
        within = [(epoch * STEPS + step, step) for epoch in range(self.epoch) for step in range(1, STEPS + 1)]
        terms = {("step/loss", number, 1 / step) for number, step in within}
        return Counter(ends | terms | {("step/ce", number, float(step)) for number, step in within})

    def wait_until_logged(self, run_id: str) -> None:
        wait_for(lambda: logged_points(run_id) == self.points())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at(port: int) -> Settings:
    return settings_for(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It stays up: what fails is the proxy before it, of which each test has its own."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.cut()


@pytest.fixture
def paths(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    with tracked_project(tmp_path, tmp_path_factory) as paths:
        yield paths


@pytest.fixture
def mortal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mortal"))
    yield server
    server.kill()


@pytest.mark.slow
def test_server_killed_in_mid_run_has_every_point_once_it_is_back(
    paths: Paths, mortal_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setattr(runtime, "device", lambda name: torch.device("cuda"))

    def machine_metrics() -> int:
        return len(history(run.id, "system/system_memory_usage_percentage"))

    training = Training(paths)
    with runs.training_run(at(mortal_server.port), paths, "train", training.path) as run:
        training.epochs(3)
        training.wait_until_logged(run.id)
        wait_for(lambda: machine_metrics() > 0)
        training.epochs(5)  # on their way; the server may have some without having answered
        mortal_server.kill()
        training.epochs(40)
        wait_for(lambda: bool(warnings(caplog)))
        mortal_server.start()
        training.epochs(5)
        training.wait_until_logged(run.id)  # not only at the end
        before = machine_metrics()
        wait_for(lambda: machine_metrics() > before)
    assert logged_points(run.id) == training.points()
    assert mlflow.get_run(run.id).info.status == "FINISHED"
    (warning,) = warnings(caplog)
    assert warning.startswith("MLflow does not take points at present (")


@pytest.mark.slow
def test_training_that_ends_while_the_server_is_away_is_completed_later(
    proxy: Proxy, paths: Paths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs, "FINISH_SECONDS", 3.0)
    training = Training(paths)
    with runs.training_run(at(proxy.port), paths, "train", training.path) as run:
        training.epochs(2)
        training.wait_until_logged(run.id)
        proxy.cut()
        training.epochs(2)
        ended = time.monotonic()
    assert time.monotonic() - ended < 6
    unconfirmed = f"MLflow has not confirmed {2 * STEPS + 2} points of this training; "
    beginnings = ("MLflow does not take points at present (", unconfirmed, "MLflow could not end the run as FINISHED: ")
    assert all(message.startswith(beginning) for message, beginning in zip(warnings(caplog), beginnings, strict=True))

    proxy.restore()
    assert logged_points(run.id).total() < training.points().total()
    paths.train_history.parent.mkdir()
    shutil.move(training.path, paths.train_history.with_suffix(".jsonl"))
    for _ in range(2):
        model_logging.complete(mlflow.MlflowClient(), run.id, paths.train_history)
        assert logged_points(run.id) == training.points()
    assert mlflow.get_run(run.id).info.status == "FINISHED"


@pytest.mark.slow
def test_stopped_training_sends_the_rest_when_it_continues(
    proxy: Proxy, paths: Paths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs, "STOP_SECONDS", 1.0)
    training, stop, run_ids = Training(paths), KeyboardInterrupt(), []

    def interrupted() -> None:
        with runs.training_run(at(proxy.port), paths, "train", training.path) as run:
            run_ids.append(run.id)
            training.epochs(2)
            training.wait_until_logged(run.id)
            proxy.cut()
            training.epochs(3)
            raise stop

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    unconfirmed = f"{3 * STEPS + 3} points of this training; missing ones are sent when the training continues"
    assert unconfirmed in caplog.text
    proxy.restore()
    with runs.training_run(at(proxy.port), paths, "train", training.path) as run:
        training.epochs(1)
    assert [run.id] == run_ids
    assert logged_points(run.id) == training.points()


@pytest.mark.slow
def test_stalled_server_does_not_slow_the_training(proxy: Proxy, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    training = Training(paths)
    with runs.training_run(at(proxy.port), paths, "train", training.path) as run:
        proxy.stall()
        started = time.monotonic()
        while time.monotonic() - started < 5:  # longer than the request that hangs
            training.epochs(1)
            time.sleep(0.2)
        proxy.cut()
        proxy.restore()
    assert training.longest < 0.5
    assert logged_points(run.id) == training.points()


def test_points_are_sent_in_as_many_batches_as_they_need(paths: Paths) -> None:
    training = Training(paths)
    with runs.training_run(settings_for(), paths, "train", training.path) as run:
        training.epochs(120)  # 1200 metrics
    assert logged_points(run.id) == training.points()


def test_points_that_a_run_has_are_not_sent_again(paths: Paths) -> None:
    training = Training(paths)
    with runs.training_run(settings_for(), paths, "train", training.path) as run:
        training.epochs(2)
    training.path.unlink()
    training.epoch = 0
    training.epochs(4)  # at other times, by which MLflow would tell them apart
    uploader = metric_uploader.MetricUploader(mlflow.MlflowClient(), run.id, metric_uploader.Tail(training.path))
    assert uploader.send_batch()
    assert not uploader.send_batch()
    assert uploader.confirmed == 4 * (STEPS + 1)
    assert logged_points(run.id) == training.points()


def test_incomplete_lines_are_skipped(tmp_path: Path) -> None:
    points = tmp_path / "points.jsonl"
    tail = metric_uploader.Tail(points)
    assert list(tail) == []
    points.write_text('{"time": 1.5, "epoch": 1, "loss": 3.0}\n{"time": 2.5, "ep')
    assert [[(metric.step, metric.timestamp) for metric in point] for point in tail] == [[(1, 1500)]]
    assert list(tail) == []
    with points.open("a") as stream:
        stream.write('och": 2, "step": 1, "steps": 9, "loss": 2.0}\n{"time": 3.5, "epo')
    assert [[(metric.key, metric.step) for metric in point] for point in tail] == [[("step/loss", 10)]]
    with points.open("a") as stream:  # it was killed there, and continues from the end of epoch 1
        stream.write('\n{"time": 4.5, "epoch": 2, "step": 1, "steps": 9, "loss": 2.0}\n')
        stream.write('{"time": 5.5, "epoch": 2, "step": 3, "steps": 9, "loss": 1.0}\n')
    assert [[(metric.key, metric.step) for metric in point] for point in tail] == [[("step/loss", 12)]]
