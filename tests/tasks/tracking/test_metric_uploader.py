"""A training's points reach a real MLflow server that is killed, away, slow or back, each of them once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from d2r_core import runtime
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import model_logging
from tasks.tracking import metric_uploader, runs
from tasks.training.metrics_log import MetricsLog

STEPS = 4  # of an epoch in these tests


class Server:
    """A real `mlflow server` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("mlflow"), "server", "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
                *("--host", "127.0.0.1", "--port", str(self.port)),
            ],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # with its worker
        self.process.wait()


class Line:
    """The network before the server: it lets through, loses every answer (`stall`) or refuses (`cut`)."""

    def __init__(self, port: int) -> None:
        self.target, self.port, self.stalled = port, free_port(), threading.Event()
        self.connections: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self.stalled.clear()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def stall(self) -> None:
        self.stalled.set()

    def cut(self) -> None:
        for connection in (self.listener, *self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                self.connections += client, server
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                if not (answers and self.stalled.is_set()):
                    sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)


class Training:
    """What the engine reports, by hand."""

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

    def sent(self) -> bool:
        note = metric_uploader.read_note(self.path)
        return note is not None and note.offset == self.path.stat().st_size


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def points_of(run_id: str) -> Counter[tuple[str, int, float]]:
    client = mlflow.MlflowClient()
    names = {name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")}
    logged = [metric for name in names for metric in client.get_metric_history(run_id, name)]
    return Counter((metric.key, metric.step, metric.value) for metric in logged)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("tasks.")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.kill()


@pytest.fixture
def line(server: Server) -> Iterator[Line]:
    between = Line(server.port)
    yield between
    between.cut()


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    monkeypatch.chdir(tmp_path)  # MLflow makes an empty folder `mlruns` wherever it is
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    found = Paths(tmp_path)
    found.manifest.parent.mkdir(parents=True)
    manifest: dict[str, Any] = {"source": "digits", "path": None, "image_size": 16, "classes": ["0", "1"], "splits": {}}
    found.manifest.write_text(json.dumps({**manifest, "hash": "ab" * 32}))
    yield found
    mlflow.end_run()


@pytest.fixture
def at(tiny_settings: Callable[..., Settings]) -> Callable[[int], Settings]:
    """`at(port)`: settings whose tracking server is there."""
    return lambda port: tiny_settings(tracking={"uri": f"http://127.0.0.1:{port}", "experiment": "shipping"})


def test_server_killed_in_mid_run_has_every_point_once_it_is_back(
    server: Server,
    paths: Paths,
    at: Callable[[int], Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setattr(runtime, "device", lambda name: torch.device("cuda"))

    def of_the_machine() -> int:
        return len(mlflow.MlflowClient().get_metric_history(run.id, "system/system_memory_usage_percentage"))

    training = Training(paths)
    with runs.training_run(at(server.port), paths, "train", training.path) as run:
        training.epochs(3)
        wait_for(training.sent)
        wait_for(lambda: of_the_machine() > 0)
        training.epochs(5)  # on their way, some perhaps there without an answer
        server.kill()
        training.epochs(40)
        wait_for(lambda: bool(warnings(caplog)))
        server.start()
        training.epochs(5)
        seen = of_the_machine()
        wait_for(lambda: of_the_machine() > seen)
    assert points_of(run.id) == training.points()
    assert mlflow.get_run(run.id).info.status == "FINISHED"
    (warning,) = warnings(caplog)
    assert warning.startswith("MLflow does not take points at present (")


def test_training_that_ends_while_the_server_is_away_is_completed_later(
    line: Line,
    paths: Paths,
    at: Callable[[int], Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(runs, "FINISH_SECONDS", 3.0)
    training = Training(paths)
    with runs.training_run(at(line.port), paths, "train", training.path) as run:
        training.epochs(2)
        wait_for(training.sent)
        line.cut()
        training.epochs(2)
        ended = time.monotonic()
    assert time.monotonic() - ended < 6
    missing = f"MLflow does not have {2 * STEPS + 2} points of this training yet; "
    begins = ("MLflow does not take points at present (", missing, "MLflow could not end the run as FINISHED: ")
    assert [message.startswith(begin) for message, begin in zip(warnings(caplog), begins, strict=True)] == [True] * 3

    line.mend()
    assert points_of(run.id).total() < training.points().total()
    paths.train_history.parent.mkdir()
    shutil.move(training.path, paths.train_history.with_suffix(".jsonl"))
    for _ in range(2):
        model_logging.complete(mlflow.MlflowClient(), run.id, paths.train_history)
        assert points_of(run.id) == training.points()
    assert mlflow.get_run(run.id).info.status == "FINISHED"


def test_stopped_training_sends_the_rest_when_it_continues(
    line: Line,
    paths: Paths,
    at: Callable[[int], Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(runs, "STOP_SECONDS", 1.0)
    training, stopped = Training(paths), KeyboardInterrupt()

    def interrupted() -> None:
        with runs.training_run(at(line.port), paths, "train", training.path):
            training.epochs(2)
            wait_for(training.sent)
            line.cut()
            training.epochs(3)
            raise stopped

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert f"{3 * STEPS + 3} points of this training yet; they are sent when the training continues" in caplog.text
    noted = metric_uploader.read_note(training.path)
    line.mend()
    with runs.training_run(at(line.port), paths, "train", training.path) as run:
        training.epochs(1)
    assert noted is not None
    assert run.id == noted.run_id
    assert points_of(run.id) == training.points()


def test_stalled_server_does_not_slow_the_training(
    line: Line, paths: Paths, at: Callable[[int], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    training = Training(paths)
    with runs.training_run(at(line.port), paths, "train", training.path) as run:
        line.stall()
        started = time.monotonic()
        while time.monotonic() - started < 5:  # longer than the request that hangs
            training.epochs(1)
            time.sleep(0.2)
        line.cut()
        line.mend()
    assert training.longest < 0.5
    assert points_of(run.id) == training.points()


def test_points_are_sent_in_as_many_batches_as_they_need(
    server: Server, paths: Paths, at: Callable[[int], Settings]
) -> None:
    training = Training(paths)
    with runs.training_run(at(server.port), paths, "train", training.path) as run:
        training.epochs(120)  # 1200 metrics
    assert points_of(run.id) == training.points()


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    points = tmp_path / "points.jsonl"
    tail = metric_uploader.Tail(points)
    assert list(tail) == []
    points.write_text('{"time": 1.5, "epoch": 1, "loss": 3.0}\n{"time": 2.5, "ep')
    assert [[(found.step, found.timestamp) for found in metrics] for metrics in tail] == [[(1, 1500)]]
    assert list(tail) == []
    with points.open("a") as stream:
        stream.write('och": 2, "step": 1, "steps": 9, "loss": 2.0}\n{"time": 3.5, "epo')
    assert [[(found.key, found.step) for found in metrics] for metrics in tail] == [[("step/loss", 10)]]
    with points.open("a") as stream:  # it was killed there, and continues from the end of epoch 1
        stream.write('\n{"time": 4.5, "epoch": 2, "step": 1, "steps": 9, "loss": 2.0}\n')
        stream.write('{"time": 5.5, "epoch": 2, "step": 3, "steps": 9, "loss": 1.0}\n')
    assert [[(found.key, found.step) for found in metrics] for metrics in tail] == [[("step/loss", 12)]]
