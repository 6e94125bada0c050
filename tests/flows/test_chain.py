"""The whole chain for real: DVC, Prefect's flow, MLflow and the registry, on digits and on real CIFAR-10 images."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import SHARED, copy_project

from tasks import prepare, pretrain, train
from tasks.config.paths import Paths
from tasks.config.settings import Settings

BIN = Path(sys.executable).parent


class Project:
    """A checkout of its own in a temporary folder, driven as a user drives it."""

    def __init__(self, root: Path, values: dict[str, Any]) -> None:
        self.root = root
        copy_project(root)
        self.values = values
        self.write()
        for command in (
            ["git", "init", "-q"],
            ["git", "add", "-A"],
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"],
        ):
            subprocess.run(command, cwd=root, check=True)
        # Prefect and MLflow of this project alone, whatever is configured on this machine.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        self.environment = kept | {"PREFECT_HOME": str(root / ".prefect"), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def write(self) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.values), encoding="utf-8")

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, name: str) -> Any:
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def weights(self) -> str:
        return hashlib.sha256((self.root / "models/target.safetensors").read_bytes()).hexdigest()

    def versions(self) -> dict[int, tuple[dict[str, str], set[str]]]:
        """Version -> its tags and its aliases."""
        from mlflow import MlflowClient

        uri, name = f"sqlite:///{self.root}/mlflow.db", self.values["promote"]["model_name"]
        client = MlflowClient(uri, registry_uri=uri)  # whatever other tests have set
        aliases = client.get_registered_model(name).aliases
        return {
            int(found.version): (found.tags, {alias for alias, held in aliases.items() if held == found.version})
            for found in client.search_model_versions(f"name = '{name}'")
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Project:
    """`d2r run` has run once in it."""
    project = Project(tmp_path_factory.mktemp("chain"), tiny_values)
    project.first_output = project.run("d2r", "run")  # type: ignore[attr-defined]
    return project


def test_d2r_run_leaves_every_artifact_and_says_where(project: Project) -> None:
    for name in (
        "data/prepared/manifest.json",
        "reports/validation/index.html",
        "models/guidance.safetensors",
        "models/target.safetensors",
        "reports/robustness.json",
        "reports/examples.parquet",
        "reports/report.html",
        "reports/model_card.md",
    ):
        assert (project.root / name).stat().st_size > 0
    output: str = project.first_output  # type: ignore[attr-defined]
    for word in ("FGSM", "PGD-2", "CW-2", "eps", "report.html", "model_card.md", "champion", "mlflow ui", "prefect"):
        assert word in output


def test_the_figures_agree_with_the_examples(project: Project) -> None:
    robustness, metrics = project.json("reports/robustness.json"), project.json("reports/metrics.json")
    examples = pd.read_parquet(project.root / "reports/examples.parquet")
    right = examples.pivot_table(index=["model", "index"], columns="attack", values="correct", aggfunc="all")
    for model, measured in robustness["models"].items():
        for attack, figure in measured["attacks"].items():
            correct = right.loc[model].all(axis=1) if attack == "worst" else right.loc[model][attack]
            assert figure["correct"] == correct.sum()
            assert figure["images"] == len(correct) == robustness["data"]["test_images"]
            assert figure["accuracy"] == pytest.approx(correct.mean())
            assert metrics[model][attack] == figure["accuracy"]
    assert (examples["correct"] == (examples["margin"] > 0)).mean() > 0.99  # ties aside


def test_a_second_run_finds_everything_up_to_date_and_registers_nothing(project: Project) -> None:
    before = project.versions()
    weights = project.weights()
    assert "up to date" in project.run("d2r", "run")
    assert project.versions() == before
    assert project.weights() == weights
    assert "Data and pipelines are up to date" in project.run("dvc", "repro")


def test_the_version_carries_its_lineage(project: Project) -> None:
    ((tags, aliases),) = project.versions().values()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project.root, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert tags["git_commit"] == commit
    assert tags["git_dirty"] == "false"
    assert tags["data_hash"] == project.json("data/prepared/manifest.json")["hash"]
    assert tags["weights_sha256"] == project.weights()
    assert aliases == {"challenger", "champion"}


def test_metrics_and_plots_can_be_shown(project: Project) -> None:
    assert "target.pgd" in project.run("dvc", "metrics", "show")
    assert "index.html" in project.run("dvc", "plots", "show", "--out", str(project.root / "plots"))


def test_status_says_where_things_are(project: Project) -> None:
    status = project.run("d2r", "status")
    for word in ("up to date", "champion", "report.html", "sqlite:///mlflow.db"):
        assert word in status


def test_a_mistyped_parameter_changes_nothing(project: Project) -> None:
    before = snapshot(project.root)
    text = (project.root / "params.yaml").read_text(encoding="utf-8")
    (project.root / "params.yaml").write_text(text.replace("momentum", "momentun"), encoding="utf-8")
    try:
        output = project.run("d2r", "run", code=1)
    finally:
        project.write()
    assert "momentun is not a known key. Did you mean 'momentum'?" in output
    assert snapshot(project.root) == before


def test_a_failing_stage_leaves_the_last_good_results(project: Project) -> None:
    before = snapshot(project.root)
    project.values["train"]["learning_rate"] = 1e30
    project.write()
    try:
        output = project.run("d2r", "run", code=1)
    finally:
        project.values["train"]["learning_rate"] = 0.05
        project.write()
    assert "the loss is not finite" in output
    assert snapshot(project.root) == before


def test_one_training_parameter_reruns_only_what_depends_on_it(project: Project) -> None:
    guidance = (project.root / "models/guidance.json").read_bytes()
    project.values["train"]["method"]["clean_weight"] = 10.0
    project.write()
    output = project.run("dvc", "repro")
    ran = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
    assert ran == ["train", "evaluate", "report"]
    assert (project.root / "models/guidance.json").read_bytes() == guidance


def test_one_seed_gives_bitwise_the_same_weights_and_another_does_not(
    tmp_path: Path, tiny_settings: Callable[..., Settings]
) -> None:
    def trained(name: str, seed: int) -> bytes:
        settings, paths = (
            tiny_settings(seed=seed, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"}),
            Paths(tmp_path / name),
        )
        for stage in (prepare, pretrain, train):
            stage.run(settings, paths)
        return paths.guidance.read_bytes() + paths.target.read_bytes()

    first = trained("first", 0)
    assert trained("again", 0) == first
    assert trained("other", 1) != first


@pytest.mark.skipif(not SHARED.is_dir(), reason="real CIFAR-10 images are not here (../shared/data)")
def test_the_chain_on_real_cifar10(tmp_path: Path, tiny_values: dict[str, Any]) -> None:
    prepare = {"source": "image_folder", "path": "data/raw/cifar10", "image_size": 32, "on_mismatch": "refuse"}
    limits = {"validation_fraction": 0.002, "train_per_class": 200, "test_per_class": 10}
    values = {**tiny_values, "prepare": {**tiny_values["prepare"], **prepare, **limits}}
    values["train"] = {**values["train"], "crop_padding": 4, "flip": True, "eps": "8/255", "step_size": "2/255"}
    values["validate"] = {**values["validate"], "max_shared_images": 100}
    project = Project(tmp_path, values)
    (tmp_path / "data/raw/cifar10").mkdir()
    for archive in ("cifar10-train-0.zip", "cifar10-train-1.zip", "cifar10-test.zip"):
        (tmp_path / "data/raw/cifar10" / archive).symlink_to(SHARED / archive)
    project.run("dvc", "repro")
    manifest = project.json("data/prepared/manifest.json")
    assert manifest["classes"][:3] == ["airplane", "automobile", "bird"]
    assert manifest["splits"]["train"]["per_class"] == [200] * 10
    assert project.json("reports/robustness.json")["models"]["target"]["attacks"]["pgd"]["images"] == 100
    shutil.rmtree(tmp_path / ".dvc/cache")


def snapshot(root: Path) -> dict[str, str]:
    """Every file that a user or the registry knows, by its content; caches and logs aside."""
    folders = ("data", "models", "reports", "mlruns")
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in [*files, root / "dvc.lock"]}
