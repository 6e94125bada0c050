"""What the quick ways in do not import: heavy packages would take longer than all that they do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scratch_project as scratch
from project import ROOT

PRINT_MODULES = "print('MODULES', json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def modules(code: str, cwd: Path = ROOT) -> set[str]:
    """The packages that a process has imported at the end of this code."""
    command = [sys.executable, "-c", f"import atexit, json, sys; atexit.register(lambda: {PRINT_MODULES}); {code}"]
    process = subprocess.run(command, cwd=cwd, env=scratch.environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.rpartition("MODULES ")[2]))


def test_status_needs_no_tensors_or_tables(finished_project: Path) -> None:
    imported = modules("sys.argv = ['d2r', 'status']; from flows.cli import main; main()", finished_project)

    assert "pydantic" in imported
    assert not imported & {"torch", "pandas", "great_expectations", "prefect", "dvc", "sklearn"}


def test_the_registry_is_read_without_pytorch() -> None:
    assert not modules("import tasks.registry.status") & {"torch", "mlflow", "pandas", "prefect"}


def test_the_flow_imports_no_tensors_before_there_is_something_to_do() -> None:
    imported = modules("import flows.retrain")

    assert "prefect" in imported
    assert not imported & {"torch", "pandas", "mlflow", "great_expectations"}


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "train"])
def test_a_stage_before_the_evaluation_imports_no_tables(stage: str) -> None:
    assert not modules(f"import tasks.{stage}") & {"pandas", "mlflow", "great_expectations", "prefect", "sklearn"}


@pytest.mark.parametrize("stage", ["validate", "evaluate", "report"])
def test_a_stage_imports_no_server_or_scheduler(stage: str) -> None:
    assert not modules(f"import tasks.{stage}") & {"mlflow", "great_expectations", "prefect", "sklearn"}
