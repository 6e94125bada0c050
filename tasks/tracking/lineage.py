"""What a model was made from: code, data and settings, as hashes."""

import os
import subprocess
from dataclasses import dataclass

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest


@dataclass(frozen=True)
class Lineage:
    git_commit: str  # "unknown" outside a git checkout without D2R_GIT_COMMIT
    git_dirty: bool  # tracked files differ from the commit
    data_hash: str  # of the prepared data, from its manifest
    settings_hash: str  # of everything that the weights depend on


def current_lineage(settings: Settings, paths: Paths) -> Lineage:
    """The lineage of what this checkout produces now. The prepared data must exist."""
    commit, dirty = _git(paths)
    return Lineage(
        git_commit=commit,
        git_dirty=dirty,
        data_hash=read_manifest(paths)["hash"],
        settings_hash=settings.hash("seed", "prepare", "pretrain", "train"),
    )


def _git(paths: Paths) -> tuple[str, bool]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(paths.root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        # An image carries no repository: its build says which commit it holds.
        return os.environ.get("D2R_GIT_COMMIT", "unknown"), False
