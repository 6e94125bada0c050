"""Several processes register and promote at once: one version for one model, one champion, a history without a loss."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow_server import Server
from project import ROOT
from registry_project import NAME, Project, make_project

from tasks.config.settings import Settings
from tasks.registry import history, lock, status
from tasks.tracking import connection

pytestmark = pytest.mark.slow

# Waits for the others, then registers or promotes: {1: settings, 2: number, 3..: versions to promote or "register"}.
WORKER = """
import pickle, sys, time
from pathlib import Path
from tasks.config.paths import Paths
from tasks.registry import moves, recorded_examples, versions
import mlflow

settings = pickle.loads(Path(sys.argv[1]).read_bytes())
Path(f"ready{sys.argv[2]}").touch()
while not Path("go").exists():
    time.sleep(0.01)
for task in sys.argv[3:]:
    if task == "register":
        print(versions.register(settings, Paths()))
    else:
        moves.promote(settings, Paths(), int(task), who="w", command="promote", reason="r", force=True)
"""


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def at_once(project: Project, tasks: list[list[str]]) -> list[str]:
    """The output lines of one process per list of tasks, all released at the same moment."""
    root = project.paths.root
    settings = root / "settings.pickle"
    settings.write_bytes(pickle.dumps(project.settings))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, settings, str(number), *own],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, own in enumerate(tasks)
    ]
    while not all((root / f"ready{number}").exists() for number in range(len(tasks))):
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.05)
    (root / "go").touch()
    outputs = [worker.communicate() for worker in workers]
    (root / "go").unlink()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert "UNIQUE constraint" not in errors
        assert worker.returncode == 0, errors
    return [line for output, _ in outputs for line in output.splitlines()]


def test_one_model_is_registered_once(project: Project) -> None:
    project.train()
    project.evaluate()
    # A server that does not know the run of the training: each registration would make one.
    for name in ("mlflow.db", "mlflow.db.lock"):
        (project.paths.root / name).unlink()
    assert at_once(project, [["register"] * 5] * 4) == ["1"] * 20
    mlflow.set_tracking_uri(f"sqlite:///{project.paths.root / 'mlflow.db'}")
    assert project.versions() == [1]
    assert len(project.runs()) == 1


def test_concurrent_promotions_leave_a_chain(project: Project) -> None:
    numbers = [project.register(seed) for seed in range(3)]
    at_once(project, [promotions(numbers, first) for first in range(3)])
    check_chain(project, numbers)


def test_concurrent_promotions_on_a_server_leave_a_chain(
    project: Project, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    numbers = [project.register(seed) for seed in range(3)]
    at_once(project, [promotions(numbers, first) for first in range(2)])
    check_chain(project, numbers)
    names = [model.name for model in mlflow.MlflowClient().search_registered_models()]
    assert names == [NAME]  # no lock is left


def promotions(numbers: list[int], first: int) -> list[str]:
    """Four promotions, in an order of its own."""
    return [str(numbers[(first + step) % len(numbers)]) for step in range(4)]


def check_chain(project: Project, numbers: list[int]) -> None:
    chain = project.history()
    assert {to for _, to in chain} == set(numbers)
    assert [came_from for came_from, _ in chain] == [None, *(to for _, to in chain[:-1])]
    assert project.champion() == chain[-1][1]
    entries = status.read_history(project.settings, project.paths)
    assert all(entry.outcome == history.COMPLETED for entry in entries)
    assert [entry.move.previous for entry in entries] == [None, *(entry.key for entry in entries[:-1])]


def test_the_lease_of_a_dead_process_is_taken_over_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    connection.configure(project.settings, project.paths)
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    client.create_registered_model("lease", {"token": "dead", "heartbeat": "3"})
    monkeypatch.setattr(lock, "LEASE", 1.0)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.2)
    inside, most, order = 0, 0, []

    def work(number: int) -> None:
        nonlocal inside, most
        with lock._lease(mlflow.MlflowClient(), "lease"):
            inside += 1
            most = max(most, inside)
            time.sleep(1.5)  # longer than the lease: the heartbeat keeps it
            order.append(number)
            inside -= 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(order) == [0, 1, 2]
    assert [model.name for model in client.search_registered_models()] == [NAME]
    assert status.read_history(project.settings, project.paths) == []
