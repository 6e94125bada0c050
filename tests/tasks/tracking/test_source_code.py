"""The code that a model was trained by can be restored from a commit and a diff."""

import os
import subprocess
from pathlib import Path

import pytest
from project import commit, git

from tasks.config.paths import Paths
from tasks.tracking.source_code import read_source_code


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks/train.py").write_bytes(b"one\r\ntwo\n\xff\n")
    (folder / "params.yaml").write_text("seed: 0\n")
    (folder / ".gitignore").write_text("*.pyc\n")
    commit(folder)
    return folder


def restored(checkout: Path, diff: str) -> Path:
    """A clone at the commit, with the diff applied."""
    folder = checkout.parent / "restored"
    git(checkout, "clone", "--quiet", ".", str(folder))
    patch = checkout.parent / "patch"
    patch.write_bytes(diff.encode(errors="surrogateescape"))
    git(folder, "apply", "--whitespace=nowarn", str(patch))
    return folder


def test_a_commit_alone_is_the_code_of_a_clean_checkout(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("Not code.")
    (checkout / "tasks/train.pyc").write_text("Ignored.")
    assert read_source_code(Paths(checkout)) == (git(checkout, "rev-parse", "HEAD").strip(), False, "", False)


def test_the_diff_restores_changed_removed_and_untracked_code(checkout: Path) -> None:
    (checkout / "tasks/old.py").write_text("old\n")
    (checkout / "tasks/binary").write_bytes(bytes(range(256)))
    commit(checkout)
    (checkout / "tasks/train.py").write_bytes(b"one\r\nthree\r\n\xff\xfe\n")
    (checkout / "tasks/binary").write_bytes(bytes(range(255, -1, -1)))
    (checkout / "tasks/old.py").unlink()
    (checkout / "tasks/new [1].py").write_text("new\n")
    index = (checkout / ".git/index").read_bytes()
    code = read_source_code(Paths(checkout))
    assert code.dirty
    assert not code.diff_redacted
    assert (checkout / ".git/index").read_bytes() == index
    assert "?? " in git(checkout, "status", "--porcelain")  # still untracked
    folder = restored(checkout, code.diff)
    names = {path.name for path in (checkout / "tasks").iterdir()}
    assert names == {"train.py", "binary", "new [1].py"}
    for name in names:
        assert (folder / "tasks" / name).read_bytes() == (checkout / "tasks" / name).read_bytes()
    assert not (folder / "tasks/old.py").exists()


def test_a_change_in_the_second_of_the_commit_is_in_the_diff(checkout: Path) -> None:
    """To git, a file of the same size and second is unchanged, unless its index is of that second as well."""
    git(checkout, "config", "core.trustctime", "false")
    train, index = checkout / "tasks/train.py", checkout / ".git/index"
    train.write_text("one\n")
    os.utime(train, (1_700_000_000, 1_700_000_000))
    commit(checkout)
    train.write_text("two\n")
    (checkout / "tasks/new.py").write_text("new\n")
    for path in (train, index):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    code = read_source_code(Paths(checkout))
    assert (restored(checkout, code.diff) / "tasks/train.py").read_text() == "two\n"


def test_settings_are_no_part_of_the_diff(checkout: Path) -> None:
    """They are kept as a file of their own."""
    (checkout / "params.yaml").write_text("seed: 1\n")
    code = read_source_code(Paths(checkout))
    assert code.dirty
    assert code.diff == ""


def test_the_diff_has_no_credentials_and_says_so(checkout: Path) -> None:
    (checkout / "tasks/train.py").write_text('uri = "http://user:PLANTED@host"\n')
    code = read_source_code(Paths(checkout))
    assert code.diff_redacted
    assert "//host" in code.diff
    assert "PLANTED" not in code.diff


def test_a_project_in_a_folder_of_its_repository_has_its_own_diff(tmp_path: Path) -> None:
    project = tmp_path / "repository/project"
    (project / "tasks").mkdir(parents=True)
    for path in (project / "tasks/train.py", tmp_path / "repository/other.py"):
        path.write_text("one\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "repository")], check=True)
    commit(tmp_path / "repository")
    (tmp_path / "repository/other.py").write_text("two\n")
    (project / "tasks/train.py").write_text("two\n")
    assert "a/tasks/train.py" in (diff := read_source_code(Paths(project)).diff)
    assert "other.py" not in diff


def test_a_git_hooks_variables_do_not_lead_elsewhere(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_source_code(Paths(checkout))
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent")
    assert read_source_code(Paths(checkout)) == expected


def test_without_a_repository_the_build_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2R_GIT_COMMIT", "abc")
    assert read_source_code(Paths(tmp_path)) == ("abc", False, "", False)
