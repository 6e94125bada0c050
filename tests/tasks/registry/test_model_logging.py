"""The run of a trained model gets what it missed, its figures, its files, and a model that can be served."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from registry_project import NAME, Project, files_of, images, logits, make_project

from d2r_core import checkpoint
from tasks.config.settings import Settings
from tasks.registry import versions
from tasks.training.metrics_log import MetricsLog

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def test_runs_get_the_points_that_they_missed(project: Project) -> None:
    """Of both trainings, from the files of points; the first row of either is there already."""
    paths, model = project.paths, project.train()
    checkpoint.save(paths.guidance, model, checkpoint.read_metadata(paths.target))
    project.train(seed=1)
    pretrained_in, trained_in = (
        checkpoint.read_metadata(path)["mlflow_run_id"] for path in (paths.guidance, paths.target)
    )
    client = mlflow.MlflowClient()
    client.update_run(pretrained_in, status="RUNNING")  # as if MLflow had been away when it ended
    for history in (paths.pretrain_history, paths.train_history):
        progress = MetricsLog("train", 2, history.with_suffix(".jsonl"), show=False)
        progress.log_epoch({"loss": 2.5}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 2)
        progress.log_epoch({"loss": 1.5}, 2)
    project.evaluate()
    versions.register(project.settings, paths)
    for run_id in (trained_in, pretrained_in):
        for name, expected in {"loss": [(1, 2.5), (2, 1.5)], "step/loss": [(3, 2.0)]}.items():
            assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)] == expected
        assert client.get_run(run_id).info.status == "FINISHED"
    assert {"pretrain_history.jsonl", "train_history.jsonl"} < files_of(trained_in)


def test_run_that_this_server_does_not_know_is_made_from_the_files(project: Project) -> None:
    project.train()
    project.evaluate()
    (trained_in,) = project.runs()
    mlflow.MlflowClient().delete_run(trained_in.info.run_id)
    version = versions.register(project.settings, project.paths)

    (run,) = project.runs()
    assert project.version(version).run_id == run.info.run_id != trained_in.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["restored_from"] == trained_in.info.run_id
    tags = ("stage", "git_commit", "git_dirty", "data_hash", "settings_hash", "d2r_version")
    assert {key: run.data.tags[key] for key in tags} == {key: trained_in.data.tags[key] for key in tags}
    assert run.data.params == trained_in.data.params
    assert run.inputs is not None
    assert trained_in.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset == trained_in.inputs.dataset_inputs[0].dataset
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "robust_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5)]

    project.with_settings(evaluate={"eps": 0.2})
    project.evaluate()
    assert project.version(versions.register(project.settings, project.paths)).run_id == run.info.run_id


def test_logged_model_gives_the_checkpoints_logits(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.register()
    # As on a machine with a GPU, which MLflow prefers: the export must stay where its weights are.
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cuda")
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@challenger")
    model, _ = checkpoint.load(project.paths.target, torch.device("cpu"))
    for count in (1, 2, 7):
        np.testing.assert_allclose(served.predict(images(count)), logits(model, images(count)), rtol=1e-5, atol=1e-5)
    requirements = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{NAME}@challenger")).read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "torch", "numpy"]
    assert "+" not in "".join(requirements)


def test_model_is_served_over_http(project: Project) -> None:
    project.register()
    model, _ = checkpoint.load(project.paths.target, torch.device("cpu"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mlflow_command = Path(sys.executable).with_name("mlflow")
    server = subprocess.Popen(
        [
            mlflow_command,
            "models",
            "serve",
            "-m",
            f"models:/{NAME}@challenger",
            "--env-manager",
            "local",
            "--port",
            str(port),
        ],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "PATH": f"{mlflow_command.parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ping"):
                    break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        for count in (1, 3):
            request = urllib.request.Request(
                f"{url}/invocations",
                json.dumps({"inputs": images(count).tolist()}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                predictions = json.load(response)["predictions"]
            np.testing.assert_allclose(predictions, logits(model, images(count)), rtol=1e-5, atol=1e-5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the worker outlives its parent
        server.wait()
