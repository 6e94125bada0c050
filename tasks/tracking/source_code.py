"""The code of a checkout: its commit, and what differs from it."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tasks.config.credentials import redact
from tasks.config.paths import Paths

# Untracked files that a stage may run or read; others, such as notes, are nobody's business.
_CODE = ("d2r_core", "tasks", "flows", "data/raw/*.dvc")


class SourceCode(NamedTuple):
    """The code of a checkout at one moment."""

    commit: str  # "unknown" outside a git checkout without D2R_GIT_COMMIT
    dirty: bool  # a tracked file differs from the commit, or code is not tracked
    diff: str  # what differs, as `git apply` takes it; without params.yaml and dvc.lock, which are kept as files
    diff_redacted: bool  # credentials were removed from the diff, which therefore is not the code that ran


def read_source_code(paths: Paths) -> SourceCode:
    """The code of the checkout as it is now, untracked modules included. Nothing is written, not even git's index."""
    try:
        commit = git(paths.root, "rev-parse", "HEAD").strip()
        new = git(paths.root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE).split("\0")[:-1]
        dirty = bool(new or git(paths.root, "status", "--porcelain", "--untracked-files=no").strip())
        diff = _diff(paths, new) if dirty else ""
    except (OSError, subprocess.CalledProcessError):
        # An image carries no repository: its build says which commit it holds.
        return SourceCode(os.environ.get("D2R_GIT_COMMIT", "unknown"), False, "", False)
    redacted = redact(diff)
    return SourceCode(commit, dirty, redacted, redacted != diff)


def git(folder: Path, *arguments: str, **variables: str) -> str:
    """The output of `git ARGUMENTS` in a folder, with these environment variables.

    Variables that name another repository (a hook of git sets them) are ignored.

    Raises:
        subprocess.CalledProcessError: git failed; its message is in `stderr`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Without optional locks, `git status` does not refresh the index.
    environment = {**inherited, "GIT_OPTIONAL_LOCKS": "0", **variables}
    output = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, env=environment)
    # Not as text, which would change line ends; bytes that are no UTF-8 survive as surrogates.
    return output.stdout.decode(errors="surrogateescape")


def _diff(paths: Paths, new: list[str]) -> str:
    """The difference to the commit, with these untracked files."""
    options = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
    excluded = [f":(exclude){path.name}" for path in (paths.params, paths.dvc_lock)]
    arguments = ("diff", "HEAD", "--relative", *options, "--", ".", *excluded)
    if not new:
        return git(paths.root, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        # In a copy of the index, untracked files count as added.
        index = Path(folder, "index")
        original = paths.root / git(paths.root, "rev-parse", "--git-path", "index").strip()
        if original.exists():
            shutil.copy2(original, index)  # with its time, by which git knows which files it must read again
        git(paths.root, "add", "--intent-to-add", "--", *new, GIT_INDEX_FILE=str(index), GIT_LITERAL_PATHSPECS="1")
        return git(paths.root, *arguments, GIT_INDEX_FILE=str(index))
