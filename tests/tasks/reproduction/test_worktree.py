"""The code of a version is restored in a worktree, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest
from project import commit, git

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.registry.provenance import Code
from tasks.reproduction import worktree
from tasks.tracking.source_code import read_source_code


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a folder for the project, uncommitted changes in it, and a hook."""
    project = tmp_path / "checkout/project"
    (project / "tasks").mkdir(parents=True)
    (project / "tasks/train.py").write_text("one\n")
    (project / ".gitignore").write_text("/models/\n/state/\n")
    git(tmp_path / "checkout", "init", "--quiet")
    commit(tmp_path / "checkout")
    hook = tmp_path / "checkout/.git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\ntouch hook-ran\n")
    hook.chmod(0o755)
    (project / "tasks/train.py").write_text("two\n")
    (project / "tasks/new.py").write_text("new\n")
    return project


@pytest.fixture
def code(checkout: Path, tmp_path: Path) -> Code:
    source = read_source_code(Paths(checkout))
    (tmp_path / "code.diff").write_text(source.diff)
    return Code(commit=source.commit, dirty=True, diff="code.diff")


@pytest.mark.parametrize("inside", [True, False])
def test_commit_and_diff_are_restored_beside_the_checkout(
    checkout: Path, code: Code, tmp_path: Path, inside: bool
) -> None:
    folder = (checkout / "state" if inside else tmp_path) / "made"
    status = git(checkout, "status", "--porcelain")
    for _ in range(2):
        project = worktree.restore(Paths(checkout), folder, code, tmp_path)
        assert project.root == folder / "project"
        assert (project.root / "tasks/train.py").read_text() == "two\n"
        assert (project.root / "tasks/new.py").read_text() == "new\n"
        assert not list(folder.rglob("hook-ran"))
        (project.root / "tasks/train.py").write_text("changed in between\n")
        project.target.parent.mkdir(exist_ok=True)
        project.target.write_text("an output")
    clean = code.model_copy(update={"diff": None})
    project = worktree.restore(Paths(checkout), folder, clean, tmp_path)
    assert (project.root / "tasks/train.py").read_text() == "one\n"
    assert not (project.root / "tasks/new.py").exists()
    assert project.target.read_text() == "an output"
    assert git(checkout, "status", "--porcelain") == status
    assert (checkout / "tasks/train.py").read_text() == "two\n"


@pytest.mark.parametrize("damage", ["half made", "not git's", "removed from the repository"])
def test_a_folder_that_is_no_intact_worktree_is_made_anew(
    checkout: Path, code: Code, tmp_path: Path, damage: str
) -> None:
    """In a folder without .git, git would act on the repository around it."""
    folder = checkout / "state/made"
    worktree.restore(Paths(checkout), folder, code, tmp_path)
    match damage:
        case "half made":
            (folder / ".git").unlink()
        case "not git's":
            (folder / ".git").write_text("gitdir: /nonexistent\n")
        case _:
            shutil.rmtree(tmp_path / "checkout/.git/worktrees")
    project = worktree.restore(Paths(checkout), folder, code, tmp_path)
    assert (project.root / "tasks/train.py").read_text() == "two\n"
    assert (checkout / "tasks/train.py").read_text() == "two\n"
    assert (checkout / "tasks/new.py").exists()


def test_code_that_cannot_be_had_is_an_error(checkout: Path, code: Code, tmp_path: Path) -> None:
    def restore(paths: Paths, **changes: object) -> None:
        worktree.restore(paths, tmp_path / "made", code.model_copy(update=changes), tmp_path)

    with pytest.raises(UserError, match=r"^Commit 0123456 is not in this repository\. `git fetch` it"):
        restore(Paths(checkout), commit="0123456")
    with pytest.raises(UserError, match="credentials, which were removed"):
        restore(Paths(checkout), diff_redacted=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="is no git repository"):
        restore(Paths(tmp_path / "elsewhere"))
    assert not (tmp_path / "made").exists()
    (tmp_path / "code.diff").write_text("--- a/tasks/train.py\n+++ b/tasks/train.py\n@@ -1 +1 @@\n-three\n+four\n")
    with pytest.raises(UserError, match=r"The code cannot be restored: error: patch failed: project/tasks/train\.py"):
        restore(Paths(checkout))
