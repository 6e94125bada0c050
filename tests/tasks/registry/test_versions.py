"""Registering, gating, promoting and rolling back, in a real sqlite store with real small models."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlflow
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from prefect import Task
from prefect.states import Failed

from d2r_core import checkpoint, data, models
from d2r_core.data import Split
from d2r_core.errors import UserError
from flows import promotion
from tasks import prefect_tasks
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation import evaluate_model
from tasks.registry import servable, versions
from tasks.tracking import connection, errors, runs
from tasks.tracking.lineage import current_lineage
from tasks.training.metrics_log import Progress

NAME = "digits"
CLASSES = [f"digit {label}" for label in range(10)]
HISTORY = "epoch,loss,clean_accuracy,robust_accuracy\n1,2.5,0.5,0.25\n2,1.5,0.75,0.5\n"
PASSED = {"key": "large_eps", "name": "A large eps fools every image", "passed": True, "found": "0 of 100 stand."}
FAILED = {"key": "more_steps", "name": "More steps are never weaker", "passed": False, "found": "100 are weaker."}
UNASKED = {"key": "black_box", "name": "White box beats black box", "passed": None, "found": "No black box."}
Change = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow makes an empty folder `mlruns` wherever it is
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def change(tiny_settings: Change) -> Change:
    """`change(promote={...})`: the settings of these tests with other values."""

    def make(**changes: Any) -> Settings:
        changes["promote"] = {"model_name": NAME, **changes.get("promote", {})}
        return tiny_settings(tracking={"uri": "sqlite:///mlflow.db", "experiment": "tests"}, **changes)

    return make


@pytest.fixture
def settings(change: Change) -> Settings:
    return change()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised database, to be copied."""
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, store: Path, settings: Settings) -> "Project":
    if not store.exists():
        connection.configure(settings, Paths(store.parent))
    shutil.copy(store, tmp_path / "mlflow.db")
    return Project(settings, Paths(tmp_path))


class Project:
    """A checkout whose stages have run: the artifacts are made by hand, the weights and the store are real."""

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self.prepare()
        documents = (paths.report, paths.model_card, paths.data_page, paths.validation / "index.html", paths.params)
        for path in (*documents, paths.examples, paths.comparison):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        paths.dvc_lock.write_text("schema: '2.0'")
        paths.pretrain_history.write_text("epoch,loss\n")
        paths.train_history.write_text(HISTORY)

    def prepare(self, seed: int = 0, labels: torch.Tensor | None = None) -> None:
        """New data; with the given labels of the test images, or each class twice."""
        images = torch.randint(
            0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        test = Split(images, torch.arange(10).repeat(2) if labels is None else labels)
        data.save_split(self.paths.prepared / "test.safetensors", test)
        manifest = {
            "source": "digits",
            "path": None,
            "classes": CLASSES,
            "image_size": 16,
            "splits": {"test": {"images": 20, "per_class": [2] * 10}},
            "hash": data.content_hash({"test": test}),
        }
        self.paths.manifest.write_text(json.dumps(manifest))

    def train(self, seed: int = 0, classes: list[str] = CLASSES) -> torch.nn.Module:
        """A target model with that seed's random weights, out of an MLflow run that logged the first of two epochs."""
        torch.manual_seed(seed)
        architecture: dict[str, Any] = {
            "name": "wide_resnet",
            "depth": 10,
            "widen_factor": 1,
            "num_classes": 10,
            "image_size": 16,
        }
        model = models.build(**architecture).eval()
        progress = Progress("train", 2, self.paths.state / str(time.time()) / "metrics.jsonl", show=False)
        with runs.training_run(self.settings, self.paths, "train", progress.path) as run:
            progress.log({"loss": 2.5, "clean_accuracy": 0.5, "robust_accuracy": 0.25}, 1)
        made_from = current_lineage(self.settings, self.paths)
        metadata = {
            "architecture": architecture,
            "classes": classes,
            "image_range": [0.0, 1.0],
            **vars(made_from),
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
        """Figures and self-checks of the target model, with the present settings and data."""
        figures: dict[str, Any] = {"clean": {"accuracy": clean, "eps": 0.0}, "worst": {"accuracy": worst, "eps": 0.1}}
        if autoattack is not None:
            figures["autoattack"] = {"name": "AutoAttack standard", "images": 50, "accuracy": autoattack, "eps": 0.1}
        content = {
            "data": {"hash": read_manifest(self.paths)["hash"]},
            "settings_hash": self.settings.hash("seed", "evaluate"),
            "models": {
                "target": {
                    "weights_sha256": checkpoint.read_metadata(self.paths.target)["weights_sha256"],
                    "attacks": figures,
                    "checks": checks,
                },
                "guidance": {"weights_sha256": "0", "attacks": {"clean": {"accuracy": 0.98, "eps": 0.0}}},
            },
        }
        self.paths.robustness.write_text(json.dumps(content))

    def register(self, seed: int = 0, **figures: Any) -> int:
        self.train(seed)
        self.evaluate(**figures)
        return versions.register(self.settings, self.paths)

    def gate(self, version: int) -> versions.Verdict:
        return versions.gate(self.settings, self.paths, version)

    def promote(self, version: int) -> None:
        versions.promote(self.settings, self.paths, version)

    def champion(self) -> int | None:
        return versions.champion(self.settings, self.paths)

    def version(self, version: int) -> ModelVersion:
        return mlflow.MlflowClient().get_model_version(NAME, str(version))

    def versions(self) -> list[int]:
        found = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
        return sorted(int(version.version) for version in found)

    def challenger(self) -> int:
        return int(mlflow.MlflowClient().get_model_version_by_alias(NAME, "challenger").version)

    def runs(self) -> list[Run]:
        return list(mlflow.search_runs(experiment_names=["tests"], output_format="list"))


def files_of(run_id: str, folder: str = "") -> set[str]:
    return {found.path for found in mlflow.MlflowClient().list_artifacts(run_id, folder)}


def images(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).random((count, 3, 16, 16), dtype=np.float32)


def logits(model: torch.nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
    return found


def test_version_holds_where_the_model_comes_from(project: Project) -> None:
    project.train()
    project.evaluate(clean=0.95, worst=0.6)
    metadata = checkpoint.read_metadata(project.paths.target)
    # As if MLflow had been away when the training ended.
    mlflow.MlflowClient().update_run(metadata["mlflow_run_id"], status="RUNNING")
    version = versions.register(project.settings, project.paths)
    found = project.version(version)
    assert found.tags == {
        "git_commit": metadata["git_commit"],
        "git_dirty": str(metadata["git_dirty"]).lower(),
        "data_hash": read_manifest(project.paths)["hash"],
        "settings_hash": metadata["settings_hash"],
        "weights_sha256": metadata["weights_sha256"],
        "evaluation_hash": project.settings.hash("seed", "evaluate"),
        "clean_accuracy": "0.95",
        "robust_accuracy": "0.6",
        "eps": "0.1",
        "checks": "passed",
        "checks_not_passed": "[]",
    }
    assert project.challenger() == version
    assert project.champion() is None

    (run,) = project.runs()
    assert found.run_id == run.info.run_id == metadata["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/target/worst"] == 0.6
    assert run.data.metrics["test/guidance/clean"] == 0.98
    assert files_of(run.info.run_id) == {
        *("report.html", "model_card.md", "data.html", "robustness.json", "examples.parquet", "comparison.json"),
        "validation",
        *("pretrain_history.csv", "train_history.csv", "params.yaml", "dvc.lock", "checkpoint"),
    }
    logged = mlflow.get_logged_model(str(found.source).removeprefix("models:/"))
    assert (logged.source_run_id, logged.experiment_id) == (run.info.run_id, run.info.experiment_id)
    assert logged.params == run.data.params
    assert not list(project.paths.root.glob("mlruns/*"))  # where the default experiment would be
    assert files_of(run.info.run_id, "validation") == {"validation/index.html"}
    assert files_of(run.info.run_id, "checkpoint") == {"checkpoint/target.json", "checkpoint/target.safetensors"}
    # The run missed the second epoch; the first one is not there twice.
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 1.5)]


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
        progress = Progress("train", 2, history.with_suffix(".jsonl"), show=False)
        progress.log({"loss": 2.5}, 1)
        progress.log_step({"loss": 2.0}, 2, 1, 2)
        progress.log({"loss": 1.5}, 2)
    project.evaluate()
    versions.register(project.settings, paths)
    for run_id in (trained_in, pretrained_in):
        for name, expected in {"loss": [(1, 2.5), (2, 1.5)], "step/loss": [(3, 2.0)]}.items():
            assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)] == expected
        assert client.get_run(run_id).info.status == "FINISHED"
    assert {"pretrain_history.jsonl", "train_history.jsonl"} < files_of(trained_in)


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
            with urllib.request.urlopen(request) as answer:
                predictions = json.load(answer)["predictions"]
            np.testing.assert_allclose(predictions, logits(model, images(count)), rtol=1e-5, atol=1e-5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the worker outlives its parent
        server.wait()


def test_same_model_is_registered_once(project: Project, change: Change) -> None:
    first = project.register()
    second = project.register(seed=1)
    assert (first, second) == (1, 2)
    assert project.challenger() == second
    project.evaluate()
    assert versions.register(project.settings, project.paths) == second
    # Another evaluation of the same weights is another version, of the same run.
    project.settings = change(evaluate={"eps": 0.2})
    project.evaluate(worst=0.1)
    third = versions.register(project.settings, project.paths)
    assert project.versions() == [1, 2, 3]
    assert project.version(third).run_id == project.version(second).run_id
    assert project.version(third).tags["robust_accuracy"] == "0.1"


def test_run_that_this_server_does_not_know_is_made_from_the_files(project: Project, change: Change) -> None:
    project.train()
    project.evaluate()
    (trained_in,) = project.runs()
    mlflow.MlflowClient().delete_run(trained_in.info.run_id)
    version = versions.register(project.settings, project.paths)

    (run,) = project.runs()
    assert project.version(version).run_id == run.info.run_id != trained_in.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["restored_from"] == trained_in.info.run_id
    kept = ("stage", "git_commit", "git_dirty", "data_hash", "settings_hash", "d2r_version")
    assert {key: run.data.tags[key] for key in kept} == {key: trained_in.data.tags[key] for key in kept}
    assert run.data.params == trained_in.data.params
    assert run.inputs is not None
    assert trained_in.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset == trained_in.inputs.dataset_inputs[0].dataset
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "robust_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5)]

    project.settings = change(evaluate={"eps": 0.2})
    project.evaluate()
    assert project.version(versions.register(project.settings, project.paths)).run_id == run.info.run_id


def test_nothing_is_registered_when_logging_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.train()
    project.evaluate()

    def fail(*arguments: object) -> str:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(servable, "log_model", fail)
        with pytest.raises(OSError, match="no space left"):
            versions.register(project.settings, project.paths)
    assert mlflow.MlflowClient().search_registered_models() == []
    (run,) = project.runs()
    assert run.info.status == "FINISHED"
    assert versions.register(project.settings, project.paths) == 1


def test_version_without_its_alias_is_found_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.train()
    project.evaluate()

    def fail(*arguments: object) -> None:
        raise mlflow.MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(UserError, match="refuses: gone"):
            versions.register(project.settings, project.paths)
    assert versions.register(project.settings, project.paths) == project.challenger() == 1


def damage_report(project: Project) -> None:
    project.paths.report.unlink()


def damage_weights(project: Project) -> None:
    project.paths.target.write_bytes(b"half")


def exchange_weights(project: Project) -> None:
    project.train(seed=1)


def exchange_data(project: Project) -> None:
    project.prepare(seed=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_report, r"report\.html is missing\. `d2r run` makes it\."),
        (damage_weights, r"target\.safetensors: cannot be read as weights"),
        (exchange_weights, r"robustness\.json: was measured on other weights than .*target\.safetensors"),
        (exchange_data, r"are of different data"),
    ],
)
def test_artifacts_that_do_not_belong_together(
    project: Project, damage: Callable[[Project], None], message: str
) -> None:
    project.train()
    project.evaluate()
    damage(project)
    with pytest.raises(UserError, match=message):
        versions.register(project.settings, project.paths)
    assert mlflow.MlflowClient().search_registered_models() == []
    assert all(files_of(run.info.run_id) == set() for run in project.runs())


def test_floors_decide_about_the_first_version(project: Project, change: Change) -> None:
    version = project.register(clean=0.95, worst=0.6)
    verdict = project.gate(version)
    assert verdict.passed
    assert project.version(version).tags["gate"] == "passed"
    assert "Clean accuracy 95.00% reaches the floor of 0.00%" in project.version(version).tags["gate_reasons"]

    project.settings = change(promote={"min_clean_accuracy": 0.96, "min_robust_accuracy": 0.7})
    verdict = project.gate(version)
    assert not verdict.passed
    assert verdict.reasons == (
        "Clean accuracy 95.00% is below the floor of 96.00% (promote.min_clean_accuracy).",
        "Robust accuracy (worst attack, eps 0.1) 60.00% is below the floor of 70.00% (promote.min_robust_accuracy).",
    )
    assert project.version(version).tags["gate"] == "failed"
    assert project.version(version).tags["gate_reasons"] == "\n".join(verdict.reasons)


def test_autoattack_must_reach_the_floor_too(project: Project, change: Change) -> None:
    project.settings = change(promote={"min_robust_accuracy": 0.5})
    verdict = project.gate(project.register(worst=0.6, autoattack=0.48))
    assert not verdict.passed
    assert verdict.reasons == (
        "Accuracy under AutoAttack standard on 50 images 48.00% is below the floor of 50.00% "
        "(promote.min_robust_accuracy).",
    )


def test_failed_self_checks_refuse_a_version(project: Project) -> None:
    trusted = project.register(seed=0, worst=0.5)
    assert "All self-checks passed." in project.gate(trusted).reasons
    project.promote(trusted)

    masked = project.register(seed=1, worst=0.9, checks=(PASSED, FAILED, UNASKED))
    assert project.version(masked).tags["checks"] == "more_steps"
    verdict = project.gate(masked)
    assert not verdict.passed
    assert verdict.reasons == (
        "Self-check failed: More steps are never weaker. 100 are weaker. See docs/evaluation.md#more-steps.",
    )
    assert project.version(masked).tags["gate"] == "failed"
    assert project.champion() == trusted


def test_self_checks_that_could_not_be_asked_are_told(project: Project) -> None:
    version = project.register(checks=(PASSED, UNASKED))
    assert project.version(version).tags["checks"] == "passed"
    verdict = project.gate(version)
    assert verdict.passed
    assert (
        "Self-check not asked: White box beats black box. No black box. See docs/evaluation.md#black-box."
        in verdict.reasons
    )


def test_version_without_self_checks_is_refused(project: Project) -> None:
    """As one that an older release registered."""
    version = project.register()
    mlflow.MlflowClient().delete_model_version_tag(NAME, str(version), "checks")
    verdict = project.gate(version)
    assert verdict.reasons == ("No self-checks were recorded with its figures. Evaluate it anew: `d2r run`.",)


def test_champion_is_replaced_by_a_better_model_only(project: Project, change: Change) -> None:
    first = project.register(seed=0, worst=0.6)
    project.promote(first)
    assert project.champion() == first
    assert project.gate(first).passed

    worse = project.register(seed=1, worst=0.55)
    verdict = project.gate(worse)
    assert not verdict.passed
    assert verdict.reasons == (
        "Robust accuracy 55.00% falls behind the champion's 60.00% (version 1, as recorded on the same data; "
        "promote.max_regression is 0.00%).",
    )
    project.settings = change(promote={"max_regression": 0.05})
    assert project.gate(worse).passed
    project.settings = change()

    better = project.register(seed=2, worst=0.65)
    assert project.gate(better).passed
    project.promote(better)
    assert project.champion() == better

    assert versions.rollback(project.settings, project.paths) == first
    assert project.champion() == first
    with pytest.raises(UserError, match="version 1 is the first champion"):
        versions.rollback(project.settings, project.paths)


def test_rollback_goes_back_step_by_step(project: Project) -> None:
    promoted = [project.register(seed) for seed in range(3)]
    for version in promoted:
        project.promote(version)
        project.promote(version)  # once more changes nothing
    assert versions.rollback(project.settings, project.paths) == promoted[1]
    assert versions.rollback(project.settings, project.paths) == promoted[0]


def test_without_champion_there_is_nothing_to_roll_back(project: Project) -> None:
    assert project.champion() is None
    with pytest.raises(UserError, match="digits has no champion"):
        versions.rollback(project.settings, project.paths)


def test_unknown_version_is_neither_gated_nor_promoted(project: Project) -> None:
    project.register()
    with pytest.raises(UserError, match="version=7"):
        project.gate(7)
    with pytest.raises(UserError, match="version=7"):
        project.promote(7)
    assert project.champion() is None


def test_champion_of_other_data_is_measured_anew(project: Project) -> None:
    model = project.train(seed=0)
    project.evaluate(worst=0.99)
    first = versions.register(project.settings, project.paths)
    project.promote(first)

    # New images, labelled as the champion sees them.
    project.prepare(seed=1)
    test = data.load_split(project.paths.prepared / "test.safetensors")
    seen = torch.from_numpy(logits(model, data.to_float(test.images).numpy()))
    project.prepare(seed=1, labels=seen.argmax(1))
    test = data.load_split(project.paths.prepared / "test.safetensors")
    measured = evaluate_model.measure(model, test, project.settings.evaluate, classes=10, seed=project.settings.seed)
    champions = measured.figures["worst"]["accuracy"]
    assert 0.1 < champions < 0.99

    better = project.register(seed=1, worst=champions + 0.01)
    assert project.gate(better).passed
    worse = project.register(seed=2, worst=champions - 0.01)
    verdict = project.gate(worse)
    assert verdict.reasons == (
        f"Robust accuracy {champions - 0.01:.2%} falls behind the champion's {champions:.2%} (version 1, "
        "measured anew on this data; promote.max_regression is 0.00%).",
    )
    # A version of data that do not lie here any more cannot be compared.
    project.prepare(seed=2)
    with pytest.raises(UserError, match="version 3 was measured on other data or with other `evaluate` settings"):
        project.gate(worse)


@pytest.mark.parametrize("other", [{"eps": 0.05}, {"norm": "L2"}, {"precision": "tf32"}])
def test_figures_of_another_evaluation_are_not_compared_as_recorded(
    project: Project, change: Change, other: dict[str, Any]
) -> None:
    project.promote(project.register(seed=0, worst=0.99))
    project.settings = change(evaluate=other)
    verdict = project.gate(project.register(seed=1, worst=0.98))
    assert verdict.passed
    assert "(version 1, measured anew on this data; " in verdict.reasons[-1]


def test_champion_of_other_classes_is_not_compared(project: Project) -> None:
    project.promote(project.register(seed=0))
    project.train(seed=1, classes=[*CLASSES[:9], "letter a"])
    project.evaluate(worst=0.9)
    verdict = project.gate(versions.register(project.settings, project.paths))
    assert not verdict.passed
    assert verdict.reasons[0].startswith("Its class list is not that of the champion (version 1)")


def test_champion_whose_checkpoint_is_gone(project: Project) -> None:
    project.promote(project.register(seed=0))
    challenger = project.register(seed=1)
    artifacts = mlflow.get_run(str(project.version(1).run_id)).info.artifact_uri
    shutil.rmtree(Path(artifacts.removeprefix("file://")) / "checkpoint")
    with pytest.raises(UserError, match=r"version 1 has no checkpoint/target\.json in its run"):
        project.gate(challenger)
    assert project.champion() == 1


def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks' functions themselves: no server, no retries."""
    for name in ("register", "gate", "promote"):
        monkeypatch.setattr(promotion, name, getattr(promotion, name).fn)


def test_promotion_lets_better_models_through(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    without_prefect(monkeypatch)
    outcomes = []
    for seed, worst in ((0, 0.6), (0, 0.6), (1, 0.5), (2, 0.7)):
        project.train(seed)
        project.evaluate(worst=worst)
        outcomes.append(promotion.promotion(project.settings, project.paths))
    assert [(outcome.version, outcome.alias, outcome.verdict.passed) for outcome in outcomes] == [
        (1, "champion", True),
        (1, "champion", True),
        (2, "challenger", False),
        (3, "champion", True),
    ]
    assert project.champion() == project.challenger() == 3


@pytest.mark.parametrize(
    "task", [prefect_tasks.compare, prefect_tasks.register, prefect_tasks.gate, prefect_tasks.promote]
)
def test_only_a_server_that_is_away_is_tried_again(task: Task[..., object]) -> None:
    assert task.retries
    condition = cast(Callable[..., bool], task.retry_condition_fn)
    assert condition(task, None, Failed(data=errors.UnavailableError("away")))
    assert not condition(task, None, Failed(data=UserError("refused")))


def test_a_registered_checkpoint_can_be_had_by_its_reference(project: Project, tmp_path: Path) -> None:
    version = project.register()
    project.promote(version)
    weights = project.paths.target.read_bytes()
    for number, reference in enumerate((f"models:/{NAME}@champion", f"models:/{NAME}/{version}")):
        path = versions.download(project.settings, project.paths, reference, tmp_path / f"had{number}")
        assert path.read_bytes() == weights
        assert checkpoint.load(path, torch.device("cpu"))
    for reference, message in (
        (f"models:/{NAME}@winner", "there is no such version in MLflow"),
        (f"models:/{NAME}/7", "there is no such version in MLflow"),
        ("models:/other@champion", "there is no such version in MLflow"),
        (f"models:/{NAME}", "write models:/NAME@champion, models:/NAME@challenger or models:/NAME/VERSION"),
    ):
        with pytest.raises(UserError, match=message):
            versions.download(project.settings, project.paths, reference, tmp_path / "none")
