"""`dvc.yaml` against the code: the order, and that every stage depends on exactly the code it runs."""

import ast
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.pipeline import dvc

ROOT = Path(__file__).parents[3]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
CHAIN = ["prepare", "validate", "pretrain", "train", "evaluate", "report"]
# Tracking only observes: a change of it changes no artifact.
OBSERVERS = {"tasks/tracking/runs.py"}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere in it, as paths; packages count if they hold code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: imports are absolute in this project"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    return {
        str(file.relative_to(ROOT))
        for name in parents
        if name.split(".")[0] in ("d2r_core", "tasks", "flows")
        for file in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__init__.py")
        if file.is_file() and holds_code(file)
    }


def holds_code(path: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


def closure(module: str) -> set[str]:
    """A file and everything of the project that it imports, directly or not."""
    found, ahead = set(), {module}
    while ahead:
        found |= ahead
        ahead = set().union(*(imported(ROOT / path) for path in ahead)) - found - OBSERVERS
    return found


def test_dvc_runs_the_chain_in_its_order() -> None:
    assert dvc.order(Paths(ROOT)) == CHAIN


def test_every_stage_needs_the_one_before_it() -> None:
    upstream = dvc.upstream(Paths(ROOT))

    assert all(before in upstream[after] for before, after in pairwise(CHAIN))


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_runs_its_own_module(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"python -m tasks.{stage}"


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_depends_on_exactly_the_code_it_runs(stage: str) -> None:
    listed = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    expected = sorted(closure(f"tasks/{stage}.py"))

    wanted = "\n".join(f"      - {path}" for path in expected)
    assert listed == expected, f"dvc.yaml, stages.{stage}.deps must end with exactly:\n{wanted}"


def test_the_report_depends_on_its_templates() -> None:
    assert "tasks/reporting/templates" in STAGES["report"]["deps"]


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_names_exactly_the_parameters_it_reads(stage: str) -> None:
    aliases = {name: field.alias or name for name, field in Settings.model_fields.items()}
    read = {
        aliases[node.attr]
        for path in closure(f"tasks/{stage}.py")
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "settings" and node.attr in aliases
    }

    # Where a stage runs and who observes it is not what it makes.
    listed = {name for name in STAGES[stage]["params"] if "." not in name}
    assert listed == read - {"runtime", "tracking"}


def test_the_report_names_the_single_parameters_that_its_templates_read() -> None:
    templates = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tasks/reporting/templates").glob("*.j2"))
    read = set(re.findall(r"settings\.(promote\.\w+)", templates))

    assert read == {name for name in STAGES["report"]["params"] if "." in name}


def test_no_out_is_made_twice() -> None:
    outs = [out for stage in STAGES.values() for out in dvc.outs(stage)]

    assert len(outs) == len(set(outs))
