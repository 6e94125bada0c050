"""The run of a trained model gets what it missed, its figures, and its files."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from registry_project import NAME, Project, files_of, make_project

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


def test_requirements_of_a_logged_model_are_known_to_registries(project: Project) -> None:
    project.register()
    requirements = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{NAME}@challenger")).read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "torch", "numpy", "safetensors"]
    assert "+" not in "".join(requirements)
