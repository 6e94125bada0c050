"""`d2r models`, `history` and `status` of a registry with versions, moves and a hold: what they show and import."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scratch_project as scratch
import yaml
from registry_project import Project, make_project

from tasks.config.settings import Settings

pytestmark = pytest.mark.slow

# {1: a command} as `d2r` runs it; then the heavy packages that it has imported.
COMMAND = """
import atexit, sys
from flows.cli import main
atexit.register(lambda: print("heavy:", sorted({"torch", "torchvision", "prefect", "sklearn"} & set(sys.modules))))
main()
"""


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """A repository with a pipeline; version 2 was champion, failed the gate, and is on hold."""
    project = make_project(scratch.make(tmp_path / "project"), tmp_path_factory, tiny_settings, monkeypatch)
    settings = project.with_settings(promote={"approval": "manual"}, prepare={"path": "input.txt"})
    project.paths.params.write_text(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True)))
    project.promote(project.register(0))
    project.judge(project.register(1, worst=0.0))
    project.promote(2)
    project.rollback()
    project.paths.dvc_lock.unlink()  # made up, and d2r status reads it
    return project


def run(project: Project, command: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, command],
        cwd=project.paths.root,
        env={**scratch.environment(), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_commands_that_only_read_show_everything_and_do_not_import_torch(project: Project) -> None:
    models, history, status = (run(project, command) for command in ("models", "history", "status"))

    assert "It fails in production." in models
    rows = [[cell.strip() for cell in line.split("│")] for line in history.splitlines() if "@" in line]
    assert [(alias, before, after) for _, _, alias, before, after, *_ in rows] == [
        ("@champion", "2", "1"),
        ("@champion", "1", "2"),
        ("@challenger", "1", "2"),
        ("@champion", "none", "1"),
        ("@challenger", "none", "1"),
    ]
    assert "champion    digits version 1" in status
    assert "challenger  digits version 2" in status
    assert "gate        version 2 failed" in status
    for output in (models, history, status):
        assert output.endswith("heavy: []\n")
