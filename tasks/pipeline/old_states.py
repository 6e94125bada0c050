"""Saved states of trainings that nobody continued."""

import shutil
import time
from pathlib import Path

from tasks.config.paths import Paths


def collect(paths: Paths, keep_days: float, *, delete: bool) -> list[tuple[Path, int]]:
    """The folders below state/ without a change for `keep_days`, with their bytes; with `delete`, deletes them."""
    before = time.time() - keep_days * 24 * 3600
    old = []
    for folder in sorted(path for path in paths.state.glob("*") if path.is_dir()):
        files = [path for path in folder.rglob("*") if path.is_file()]
        newest = max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)
        if newest < before:
            old.append((folder, sum(path.stat().st_size for path in files)))
            if delete:
                shutil.rmtree(folder)
    return old
