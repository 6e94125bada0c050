"""Removes from DVC's cache what nothing refers to, with `dvc gc`.

DVC keeps what the workspace and all commits refer to. The versions in the registry may come from neither, so each of
their `dvc.lock` files is shown to DVC as one more project that shares the cache.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.config.paths import Paths
from tasks.pipeline import dvc


def collect(paths: Paths, locks: Sequence[Path], *, delete: bool) -> list[str]:
    """Run `dvc gc`, as a dry run unless `delete`; returns its output lines.

    Args:
        locks: `dvc.lock` files whose contents stay.

    Raises:
        UserError: DVC failed; nothing was removed.
    """
    cache = Path(dvc.cache_folder(paths))
    with tempfile.TemporaryDirectory() as folder:
        projects = [_project(Path(folder, str(number)), lock, cache) for number, lock in enumerate(locks)]
        commits = ["--all-commits"] if (paths.root / ".git").exists() else []
        others = ["--projects", *map(str, projects)] if projects else []
        how = ["--force"] if delete else ["--dry", "--force"]
        return dvc.run_dvc(["gc", "--workspace", *commits, *how, *others], paths)


def _project(folder: Path, lock: Path, cache: Path) -> Path:
    """A DVC project whose only stage has everything as its output that the lock names and the cache holds."""
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values()
    contents = {
        entry["md5"]: entry
        for stage in stages
        for entry in (*stage.get("deps", []), *stage.get("outs", []))
        if _is_cached(entry, cache)
    }
    # By content and under new names: a path may be there twice, in the states that two stages saw.
    entries = {str(number): {**entry, "path": str(number)} for number, entry in enumerate(contents.values())}
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n", encoding="utf-8")
    stage: dict[str, Any] = {"cmd": "none"}
    locked = {"schema": "2.0", "stages": {"all": {**stage, "outs": list(entries.values())}}}
    declared = {"stages": {"all": {**stage, "outs": list(entries)}}}
    for name, content in (("dvc.yaml", declared), ("dvc.lock", locked)):
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def _is_cached(entry: dict[str, Any], cache: Path) -> bool:
    value = str(entry.get("md5", ""))
    return bool(value) and (cache / "files/md5" / value[:2] / value[2:]).exists()
