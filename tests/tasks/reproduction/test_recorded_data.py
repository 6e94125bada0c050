"""Recorded outs come from the cache or the remote of a checkout, in which nothing changes."""

import shutil
from pathlib import Path

import pytest
import scratch_project as scratch
from project import commit

from tasks.config.paths import Paths
from tasks.pipeline import dvc, remote
from tasks.reproduction import recorded_data

pytestmark = pytest.mark.slow

TARGETS = ("first", "second")


@pytest.fixture
def checkout(finished_project: Path) -> Path:
    """A checkout with a remote that is named relative to it, and one with a password in the local configuration."""
    paths = Paths(finished_project)
    dvc.reproduce("second", paths, print)
    dvc.run_dvc(["remote", "add", "--default", "storage", "../storage"], paths)
    commit(finished_project)
    dvc.run_dvc(["remote", "add", "--local", "private", "https://user:PLANTED@127.0.0.1:9/x"], paths)
    return finished_project


@pytest.fixture
def project(checkout: Path, tmp_path: Path) -> Path:
    """What a worktree has: what git tracks, in another place."""
    ignore = shutil.ignore_patterns("cache", "tmp", "config.local", "*.txt", ".git")
    folder = shutil.copytree(checkout, tmp_path / "elsewhere/code", ignore=ignore)
    shutil.copy(checkout / "input.txt", folder)
    commit(folder)
    return folder


@pytest.mark.parametrize("source", ["cache", "remote"])
def test_outs_come_from_cache_or_remote(checkout: Path, project: Path, source: str) -> None:
    if source == "remote":
        dvc.run_dvc(["push"], Paths(checkout))
        shutil.rmtree(checkout / ".dvc/cache")
    before = scratch.tree(checkout)
    assert recorded_data.fetch(Paths(checkout), Paths(project), TARGETS) == ""
    assert scratch.tree(checkout) == before
    for name in ("first.txt", "second.txt", "more.txt"):
        assert (project / name).read_bytes() == (checkout / name).read_bytes()
    assert all(recorded_data.is_complete(Paths(project), stage) for stage in TARGETS)
    assert (project / ".dvc/cache/files").is_dir()
    assert "PLANTED" not in (project / ".dvc/config.local").read_text()
    # It runs here what ran there.
    lines: list[str] = []
    dvc.run_again("second", Paths(project), lines.append)
    assert "second: two" in lines
    assert scratch.tree(checkout) == before


def test_outs_of_one_stage_come_where_those_of_another_are_missing(checkout: Path, project: Path) -> None:
    shutil.rmtree(checkout / ".dvc/cache")
    (checkout / "second.txt").unlink()
    (checkout / "more.txt").unlink()
    dvc.run_dvc(["commit", "--force", "first"], Paths(checkout))
    message = recorded_data.fetch(Paths(checkout), Paths(project), TARGETS)
    assert "second.txt" in message
    assert [recorded_data.is_complete(Paths(project), stage) for stage in TARGETS] == [True, False]


def test_the_default_remote_has_no_password_and_says_what_it_has(checkout: Path) -> None:
    paths = Paths(checkout)
    storage = remote.default_remote(paths)
    assert storage == ("storage", str(checkout.parent / "storage"), True)
    assert remote.is_pushed(["first"], paths) is False
    dvc.run_dvc(["push", "first"], paths)
    assert remote.is_pushed(["first"], paths) is True
    assert remote.is_pushed(TARGETS, paths) is False
    dvc.run_dvc(["config", "--local", "core.remote", "private"], paths)
    storage = remote.default_remote(paths)
    assert storage == ("private", "https://127.0.0.1:9/x", True)
    dvc.run_dvc(["remote", "modify", "--local", "private", "url", "s3://bucket/x"], paths)
    assert remote.is_pushed(["first"], paths) is None
