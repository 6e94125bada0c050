"""`d2r gc` deletes what nothing refers to, and nothing else."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from registry_project import NAME, Project, images, logged_model_folder, make_project

from tasks.config.settings import Settings
from tasks.pipeline import cache_cleanup, dvc, old_states
from tasks.registry import unused

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def collect(project: Project, folder: Path, keep_days: float = 0, *, delete: bool = False) -> unused.Unused:
    folder.mkdir()
    return unused.collect(project.settings, project.paths, keep_days, folder, delete=delete)


def parent_of(run: str) -> str:
    """The run of the pass of the chain that a training belongs to."""
    return str(mlflow.get_run(run).data.tags["mlflow.parentRunId"])


def with_one_unused(project: Project) -> int:
    """1 was champion, 2 is champion, 3 is unused, 4 is on hold (it was champion, too), 5 is challenger."""
    for seed in range(5):
        # Each of other settings, so that no run counts as another's guidance.
        project.with_settings(train={"learning_rate": 0.01 * (seed + 1)})
        project.register(seed)
    for version in (1, 2, 4):
        project.promote(version)
    project.rollback()
    assert (project.champion(), project.challenger()) == (2, 5)
    return 3


def test_what_is_referred_to_stays(project: Project, tmp_path: Path) -> None:
    gone = with_one_unused(project)
    run = str(project.version(gone).run_id)
    model = str(project.version(gone).source).removeprefix("models:/")

    assert collect(project, tmp_path / "1", keep_days=1).versions == [], "all are recent"
    listed = collect(project, tmp_path / "2")
    assert [int(version.version) for version in listed.versions] == [gone]
    assert [(entry.model_id, size > 10_000) for entry, size in listed.models] == [(model, True)]
    assert [(entry.info.run_id, size > 0) for entry, size in listed.runs] == [(run, True), (parent_of(run), False)]
    assert len(listed.dvc_locks) == 4
    assert project.versions() == [1, 2, 3, 4, 5], "a dry run deletes nothing"

    collect(project, tmp_path / "3", delete=True)
    assert project.versions() == [1, 2, 4, 5]
    for version in (1, 2, 4, 5):
        assert len(mlflow.pyfunc.load_model(f"models:/{NAME}/{version}").predict(images(2))) == 2
        assert mlflow.get_run(str(project.version(version).run_id)).info.lifecycle_stage == "active"
    assert mlflow.get_run(run).info.lifecycle_stage == "deleted"
    assert collect(project, tmp_path / "4").versions == []


def test_a_copy_keeps_the_files_that_it_shares(project: Project, tmp_path: Path) -> None:
    gone = with_one_unused(project)
    version, client = project.version(gone), MlflowClient()
    client.create_registered_model("production")
    client.create_model_version("production", str(version.source), version.run_id, tags=dict(version.tags))
    result = collect(project, tmp_path / "gc", delete=True)
    assert [int(entry.version) for entry in result.versions] == [gone]
    assert (result.models, result.runs) == ([], [])
    assert mlflow.pyfunc.load_model("models:/production/1") is not None


def test_a_killed_deletion_is_finished_by_the_next(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = with_one_unused(project)
    run = str(project.version(gone).run_id)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("delete_logged_model", "delete_run"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, name, killed)
            with pytest.raises(KeyboardInterrupt):
                collect(project, tmp_path / name, delete=True)
        assert gone not in project.versions()
    result = collect(project, tmp_path / "again", delete=True)
    assert [entry.info.run_id for entry, _ in result.runs] == [run, parent_of(run)]
    assert mlflow.get_run(run).info.lifecycle_stage == "deleted"


def test_mlflow_then_removes_the_files(project: Project, tmp_path: Path) -> None:
    """The command that `d2r gc` names."""
    gone = with_one_unused(project)
    folder = logged_model_folder(project.version(gone))
    collect(project, tmp_path / "gc", delete=True)
    assert folder.exists()
    command = [str(Path(sys.executable).with_name("mlflow")), "gc", "--backend-store-uri", "sqlite:///mlflow.db"]
    subprocess.run(command, check=True, env={**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
    assert not folder.exists()
    remaining = MlflowClient().search_runs(["1"], run_view_type=ViewType.ALL)
    assert len([entry for entry in remaining if entry.info.lifecycle_stage == "deleted"]) == 0
    assert mlflow.pyfunc.load_model(f"models:/{NAME}@champion") is not None


def test_states_that_nobody_continued(project: Project) -> None:
    for name, age in (("old", 40), ("new", 1)):
        path = project.paths.state / name / "state.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - age * 86400,) * 2)
    (project.paths.state / "other").mkdir(exist_ok=True)
    listed = old_states.collect(project.paths, 30, delete=False)
    assert [(path.name, size) for path, size in listed] == [("old", 5)]
    old_states.collect(project.paths, 30, delete=True)
    assert not (project.paths.state / "old").exists()
    assert (project.paths.state / "new/state.pt").exists()


def test_dvc_keeps_what_a_version_needs(finished_project: Path, tmp_path: Path) -> None:
    """The lock of a version whose outs neither the workspace nor a commit refers to any more."""
    from tasks.config.paths import Paths

    paths = Paths(finished_project)
    subprocess.run(
        [
            "git",
            "-C",
            str(finished_project),
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@t",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "t",
        ],
        check=True,
    )
    lock = tmp_path / "version/dvc.lock"
    lock.parent.mkdir()
    lock.write_bytes(paths.dvc_lock.read_bytes())
    first = (finished_project / "first.txt").read_bytes()
    for content in ("once ", "twice "):
        (finished_project / "input.txt").write_text(content)
        dvc.reproduce("first", paths, print)
    cache = Path(dvc.cache_folder(paths))

    def contents() -> set[bytes]:
        return {path.read_bytes() for path in cache.rglob("*") if path.is_file()}

    assert {first, b"once first", b"twice first"} <= contents()
    cache_cleanup.collect(paths, [lock], delete=False)
    assert b"once first" in contents(), "a dry run"
    cache_cleanup.collect(paths, [lock], delete=True)
    assert {first, b"twice first"} <= contents()
    assert b"once first" not in contents()


def test_a_parent_stays_with_its_trainings_and_an_empty_one_goes(project: Project, tmp_path: Path) -> None:
    project.register(0)
    project.promote(1)
    run = str(project.version(1).run_id)
    client = MlflowClient()
    tags = {name: mlflow.get_run(run).data.tags[name] for name in ("data_hash", "settings_hash")}
    empty, running = (client.create_run("1", tags={**tags, "stage": "chain"}).info.run_id for _ in range(2))
    client.set_terminated(empty, "FAILED")
    result = collect(project, tmp_path / "gc", delete=True)
    assert [entry.info.run_id for entry, _ in result.runs] == [empty]
    for needed in (run, parent_of(run), running):
        assert mlflow.get_run(needed).info.lifecycle_stage == "active"
