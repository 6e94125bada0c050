"""The project under test: its files, its settings, and copies of it in other folders."""

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tasks.config import settings as settings_file
from tasks.config.settings import Settings

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"  # real images; tests that need them are skipped without them


def params() -> dict[str, Any]:
    """The values of params.yaml."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return values


def settings_from(values: dict[str, Any], **changes: Any) -> Settings:
    """The settings with these values, changed: `settings_from(params(), train={"epochs": 2}, seed=3)`."""
    values = copy.deepcopy(values)
    for section, change in changes.items():
        if isinstance(change, dict):
            values[section].update(change)
        else:
            values[section] = change
    return settings_file.parse(values)


def copy_project(folder: Path) -> None:
    """Copy everything that the pipeline needs, as in a fresh checkout."""
    for name in ("d2r_core", "tasks", "flows", "presets", ".dvc"):
        ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "reports/champion").mkdir(parents=True)
    shutil.copy(ROOT / "reports/champion/.gitkeep", folder / "reports/champion")
    shutil.copytree(ROOT / "data/raw", folder / "data/raw", ignore=shutil.ignore_patterns("*.dvc"))


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    """Commit everything in the folder, which becomes a git repository if it is none."""
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "a version")


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without settings of Prefect and MLflow, and with these variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return own | variables
