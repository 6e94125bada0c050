"""A registered version is made again from its entry: the same bits, or what differs is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from project import ROOT, clean_environment, commit, copy_project, git, settings_from
from registry_project import logged_model_folder

from tasks.config.paths import Paths
from tasks.registry import moves, versions
from tasks.registry.provenance import PrefectRun, Provenance

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


class Project:
    """A checkout in which the stages have really run, with three registered versions."""

    def __init__(self, root: Path, values: dict[str, Any]) -> None:
        self.root, self.values = root, values
        self.name = values["promote"]["model_name"]
        copy_project(root)
        shutil.copy(ROOT / "requirements.lock", root)
        self.write_params()
        commit(root)
        self.environment = clean_environment(
            PATH=f"{BIN}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="300"
        )

    def write_params(self) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.values), encoding="utf-8")

    def edit(self, name: str, before: str, after: str) -> None:
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1
        path.write_text(text.replace(before, after), encoding="utf-8")

    def run(self, *command: str, code: int = 0) -> str:
        process = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=500, check=False
        )
        output = process.stdout + process.stderr
        assert process.returncode == code, f"{command} ended with {process.returncode}:\n{output}"
        assert "Traceback" not in output
        return output

    def register(self, prefect_run: PrefectRun | None = None) -> int:
        self.run("dvc", "repro", "--quiet")
        return versions.register(settings_from(self.values), Paths(self.root), prefect_run)

    def entry(self, version: int) -> Path:
        """The folder of this project's files in a version's logged model."""
        client = mlflow.MlflowClient(f"sqlite:///{self.root}/mlflow.db", f"sqlite:///{self.root}/mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{self.root}/mlflow.db")
        return logged_model_folder(client.get_model_version(self.name, str(version))) / "data/model"

    def provenance(self, version: int) -> Provenance:
        return Provenance.read(self.entry(version), "the version")

    def snapshot(self) -> dict[str, tuple[int, float]]:
        """Size and time of every file but those of git; DVC's own notes and locks do not count."""
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime)
            for path in self.root.rglob("*")
            if path.is_file()
            and not path.is_relative_to(self.root / ".git")
            and not path.is_relative_to(self.root / ".dvc/tmp")
            and path.suffix not in (".lock", ".db-shm", ".db-wal", ".pyc")
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Iterator[Project]:
    """Version 1: of a clean commit. Version 2: of uncommitted training code. Version 3: of evaluation code that nobody
    knows."""
    values = {**tiny_values, "tracking": {**tiny_values["tracking"], "uri": "sqlite:///mlflow.db"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project = Project(tmp_path_factory.mktemp("reproduced") / "project", values)
        patch.chdir(project.root)
        project.run("dvc", "remote", "add", "--quiet", "--default", "storage", "../storage")
        commit(project.root)
        assert project.register(PrefectRun(id="1234", name="retrain")) == 1
        project.run("dvc", "push", "--quiet")
        project.edit("tasks/train.py", "settings.seed + 1", "settings.seed + 2")
        assert project.register() == 2
        commit(project.root)
        project.edit("tasks/evaluation/evaluate_model.py", "eps=settings.eps,", "eps=settings.eps / 100,")
        project.values["evaluate"]["check_images"] = 10
        project.write_params()
        project.run("dvc", "repro", "--quiet")
        git(project.root, "checkout", "tasks/evaluation/evaluate_model.py")
        assert versions.register(settings_from(project.values), Paths(project.root)) == 3
        yield project


def test_a_version_carries_where_it_came_from(project: Project) -> None:
    head, provenance = git(project.root, "rev-parse", "HEAD~1").strip(), project.provenance(1)
    for origin in (provenance.training, provenance.registration):
        assert origin.code is not None
        assert (origin.code.commit, origin.code.diff) == (head, None)
        assert origin.environment is not None
        assert origin.environment.threads == 1
        assert origin.environment.requirements_lock
    assert provenance.validation
    assert provenance.validation.success
    assert provenance.guidance
    assert provenance.raw_data
    assert (provenance.raw_data.path, provenance.raw_data.dvc_file) == ("data/raw", None)
    assert provenance.storage.model_dump() == {
        "remote": "storage",
        "url": str(project.root.parent / "storage"),
        "pushed": "no",
    }
    assert provenance.prefect_run == PrefectRun(id="1234", name="retrain")
    dirty = project.provenance(2)
    assert dirty.training.code == dirty.registration.code
    assert dirty.training.code
    assert dirty.training.code.diff == "code.diff"
    assert "+        seed=settings.seed + 2," in (project.entry(2) / "code.diff").read_text()
    # The stages before `train` were pushed and are the same.
    assert dirty.storage.pushed == "yes"
    assert dirty.prefect_run is None


def test_a_version_is_trained_again_bit_by_bit(project: Project, tmp_path: Path) -> None:
    before = project.snapshot()
    output = project.run("d2r", "reproduce", "1", "--train", "--folder", str(tmp_path / "folder"))
    assert "target weights: bitwise the same" in output
    assert "guidance weights: bitwise the same" in output
    assert "reproduced: the same" in output
    assert "differs from the record" not in output
    assert project.snapshot() == before


def test_a_version_of_uncommitted_code_is_trained_again_after_an_interruption(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    command = ["d2r", "reproduce", "2", "--train", "--folder", str(folder)]
    process = subprocess.Popen(
        command, cwd=project.root, env=project.environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (folder / "code/models/guidance.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while "pretrain" not in json.loads((folder / "reproduction.json").read_text())["stages"]:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = project.run(*command)
    assert "pretrain: made before the interruption" in output
    assert "with code.diff" in output
    assert "target weights: bitwise the same" in output
    assert "reproduced: the same" in output


@contextmanager
def moved_away(*folders: Path) -> Iterator[None]:
    for folder in folders:
        folder.rename(folder.with_name("away"))
    yield
    for folder in folders:
        folder.with_name("away").rename(folder)


def test_a_figure_that_differs_is_named(project: Project, tmp_path: Path) -> None:
    """The data come from the remote."""
    with moved_away(project.root / ".dvc/cache"):
        output = project.run("d2r", "reproduce", "3", "--folder", str(tmp_path / "folder"), code=1)
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in output.splitlines() if "\u2502" in line]
    same = {(row[0], row[1]): row[4] for row in rows}
    assert same["target", "clean"] == "yes"
    assert same["target", "pgd"] == "NO"
    assert "tasks/evaluation is not as recorded in dvc.lock for the stage evaluate" in output
    assert "NOT reproduced" in output


def test_data_that_are_nowhere_are_prepared_again_and_models_are_not(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with moved_away(project.root / ".dvc/cache", project.root.parent / "storage"):
        output = project.run("d2r", "reproduce", "1", "--folder", str(folder), code=1)
    assert "The guidance model of the version is in neither DVC's cache nor its remote" in output
    assert json.loads((folder / "reproduction.json").read_text())["stages"] == ["prepare"]


def test_a_changed_entry_is_refused(project: Project, tmp_path: Path) -> None:
    diff = project.entry(2) / "code.diff"
    original = diff.read_text()
    diff.write_text(original.replace("seed + 2", "seed + 3"))
    output = project.run("d2r", "reproduce", "2", "--folder", str(tmp_path / "folder"), code=1)
    diff.write_text(original)
    assert "not as registered: data/model/code.diff" in output
    assert not (tmp_path / "folder").exists()


def test_another_repository_and_another_folder_are_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    params = {
        **project.values,
        "tracking": {**project.values["tracking"], "uri": f"sqlite:///{project.root}/mlflow.db"},
    }
    (tmp_path / "other/params.yaml").write_text(yaml.safe_dump(params))
    commit(tmp_path / "other")
    command = [str(BIN / "d2r"), "reproduce", "1", "--folder"]
    for folder, message in ((tmp_path / "new", "is not in this repository"), (project.root, "is not empty")):
        process = subprocess.run(
            [*command, str(folder)],
            cwd=tmp_path / "other",
            env=project.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 1
        assert message in process.stderr


def test_lineage_is_a_tree_from_raw_data_to_aliases(project: Project) -> None:
    settings, paths = settings_from(project.values), Paths(project.root)
    moves.promote(settings, paths, 2, who="tester@host", command="promote", reason="It is better.", force=True)
    before = project.snapshot()
    lines = project.run("d2r", "lineage", "2").splitlines()
    assert project.snapshot() == before
    tree = "\n".join(lines)
    head = git(project.root, "rev-parse", "HEAD~1").strip()
    beginnings = (
        "raw data: digits, data/raw, md5 ",
        "prepared data: ",
        "validation: accepted, ",
        "guidance model: ",
        "target model: ",
        f"code: commit {head[:12]} with code.diff",
        "evaluation: settings ",
        f"{project.name} version 2: registered ",
        "aliases: @champion",
        "@champion from none to 2 by tester@host",
    )
    positions = [tree.index(beginning) for beginning in beginnings]
    assert positions == sorted(positions)
    assert "pushed: yes" in tree
    output = project.run("d2r", "lineage", "9", code=1)
    assert "has no version 9" in output
