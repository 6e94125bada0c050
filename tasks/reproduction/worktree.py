"""The code of a version: a git worktree at its commit, with its diff applied."""

import shutil
import subprocess
from pathlib import Path

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.registry.provenance import Code
from tasks.tracking.source_code import git

# A hook of the user's repository is not to run in a worktree that it does not know.
_WITHOUT_HOOKS = ("-c", "core.hooksPath=/dev/null")


def restore(paths: Paths, folder: Path, code: Code, entry: Path) -> Paths:
    """Bring that code into `folder`, which is or becomes a worktree of this checkout's repository.

    Finished outputs in it, which git ignores, stay.

    Args:
        paths: of the user's checkout, in which nothing changes.
        entry: the folder with the files of the version, the diff among them.

    Returns:
        The paths of the project in the worktree.

    Raises:
        UserError: this is no git repository, it does not have the commit, or the diff cannot be applied.
    """
    _check(paths, code)
    try:
        prefix = git(paths.root, "rev-parse", "--show-prefix").strip()
        if not _is_worktree(folder):
            shutil.rmtree(folder, ignore_errors=True)
            arguments = ("worktree", "add", "--force", "--detach", str(folder.resolve()), code.commit)
            git(paths.root, *_WITHOUT_HOOKS, *arguments)
        git(folder, *_WITHOUT_HOOKS, "checkout", "--quiet", "--force", "--detach", code.commit)
        project = Paths(folder / prefix)
        git(project.root, "clean", "-ffdq", "--", "d2r_core", "tasks", "flows")  # what an earlier diff has added
        if code.diff:
            # From the top, since in a folder git silently leaves out the files that it takes to be outside of it.
            directory = f"--directory={prefix.rstrip('/')}"
            git(folder, "apply", "--whitespace=nowarn", directory, str((entry / code.diff).resolve()))
    except subprocess.CalledProcessError as error:
        raise UserError(f"The code cannot be restored: {_message(error)}") from None
    return project


def _check(paths: Paths, code: Code) -> None:
    try:
        git(paths.root, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"{paths.root.resolve()} is no git repository. Run this in a clone of the repository that the version was "
            "made in."
        ) from None
    try:
        git(paths.root, "cat-file", "-e", f"{code.commit}^{{commit}}")
    except subprocess.CalledProcessError:
        raise UserError(
            f"Commit {code.commit} is not in this repository. `git fetch` it, or run this in the repository that the "
            "version was made in."
        ) from None
    if code.diff_redacted:
        raise UserError(
            f"The uncommitted changes of the version ({code.diff}) contained what looked like credentials, which were "
            "removed, so its code cannot be restored."
        )


def _is_worktree(folder: Path) -> bool:
    """Whether the folder itself is an intact worktree: git would otherwise act on the repository around it."""
    if not (folder / ".git").is_file():
        return False
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").strip()) == folder.resolve()
    except subprocess.CalledProcessError:  # it was removed from the repository
        return False


def _message(error: subprocess.CalledProcessError) -> str:
    return str(error.stderr.decode(errors="replace").strip())
