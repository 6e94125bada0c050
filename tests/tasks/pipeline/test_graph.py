"""`dvc.yaml` against the code: the order, and that every stage depends on the code that can change its result."""

import ast
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from conftest import copy_project
from imports import ROOT, imported_files, syntax
from jinja2 import meta, nodes

from d2r_core import files
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.config.stage_code import stage_code
from tasks.pipeline import dvc

GRAPH = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
STAGES: dict[str, dict[str, Any]] = yaml.safe_load(GRAPH)["stages"]
CHAIN = ["prepare", "validate", "pretrain", "train", "evaluate", "report"]
TEMPLATES = "tasks/reporting/templates"

# What stages import and do not depend on, because it cannot change a result. dvc.yaml says why of each.
PLUMBING = [
    "tasks/config",
    "tasks/tracking",
    "tasks/data/manifest.py",
    "d2r_core/files.py",
    "d2r_core/errors.py",
    "d2r_core/interruption.py",
]


def covers(entry: str, path: str) -> bool:
    """Whether `path` is the file `entry`, or lies in the room `entry`."""
    return path == entry or path.startswith(f"{entry}/")


def is_plumbing(path: str) -> bool:
    return any(covers(entry, path) for entry in PLUMBING)


def closure(stage: str) -> dict[str, str]:
    """A stage's file and all that it imports, directly or not, each with a file that imports it; without plumbing."""
    importers: dict[str, str] = {}
    ahead = {f"tasks/{stage}.py": "dvc.yaml"}
    while ahead:
        importers |= ahead
        ahead = {
            path: importer
            for importer in ahead
            for path in imported_files(importer)
            if path not in importers and not is_plumbing(path)
        }
    return importers


def template_syntax(path: str) -> nodes.Template:
    return jinja2.Environment().parse((ROOT / path).read_text(encoding="utf-8"))


def templates(stage: str) -> dict[str, str]:
    """The templates that a stage renders and those that they include, each with the file that names it."""
    users: dict[str, str] = {}
    ahead = {
        f"{TEMPLATES}/{node.value}": path
        for path in closure(stage)
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".j2")
    }
    while ahead:
        users |= ahead
        ahead = {
            f"{TEMPLATES}/{name}": user
            for user in ahead
            for name in meta.find_referenced_templates(template_syntax(user))
            if name and f"{TEMPLATES}/{name}" not in users
        }
    return users


def test_dvc_runs_the_chain_in_its_order() -> None:
    assert dvc.order(Paths(ROOT)) == CHAIN


def test_every_stage_needs_the_one_before_it() -> None:
    upstream = dvc.upstream(Paths(ROOT))

    assert all(before in upstream[after] for before, after in pairwise(CHAIN))


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_runs_its_own_module(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"python -m tasks.{stage}"


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_depends_on_all_code_that_can_change_its_result(stage: str) -> None:
    used = closure(stage) | templates(stage)

    missing = {path: user for path, user in used.items() if not any(covers(dep, path) for dep in stage_code(stage))}

    lines = [f"{path} or its room, which {user} uses" for path, user in sorted(missing.items())]
    assert not missing, f"dvc.yaml: stages.{stage}.deps must list " + "; ".join(lines)


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_depends_on_no_code_that_it_does_not_use(stage: str) -> None:
    used = closure(stage) | templates(stage)

    superfluous = [dep for dep in stage_code(stage) if not any(covers(dep, path) for path in used)]

    assert not superfluous, f"dvc.yaml, stages.{stage}.deps: nothing of these is imported"


@pytest.mark.parametrize("stage", CHAIN)
def test_no_dependency_lies_in_another_one(stage: str) -> None:
    code = stage_code(stage)

    assert not [path for path in code for dep in code if path != dep and covers(dep, path)]


@pytest.mark.parametrize("entry", PLUMBING)
def test_plumbing_is_used_and_explained(entry: str) -> None:
    assert any(covers(entry, path) for stage in CHAIN for file in closure(stage) for path in imported_files(file))
    assert f"#   {entry} " in GRAPH


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_names_exactly_the_parameters_it_reads(stage: str) -> None:
    aliases = {name: field.alias or name for name, field in Settings.model_fields.items()}
    read = {
        aliases[node.attr]
        for path in closure(stage)
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "settings" and node.attr in aliases
    }

    # Where a stage runs is not what it makes.
    listed = {name for name in STAGES[stage]["params"] if "." not in name}
    assert listed == read - {"runtime"}


def test_the_report_names_the_parameters_that_only_its_templates_read() -> None:
    read = {
        f"{node.node.attr}.{node.attr}"
        for path in templates("report")
        for node in template_syntax(path).find_all(nodes.Getattr)
        if isinstance(node.node, nodes.Getattr)
        and isinstance(node.node.node, nodes.Name)
        and node.node.node.name == "settings"
    }
    assert read
    # A change of these reaches the report through what the stages before it make.
    upstream = {name for stage in CHAIN[:-1] for name in STAGES[stage]["params"]}

    listed = {name for name in STAGES["report"]["params"] if "." in name}
    assert listed == {name for name in read if name.partition(".")[0] not in upstream}


def test_no_out_is_made_twice() -> None:
    outs = [out for stage in STAGES.values() for out in dvc.outs(stage)]

    assert len(outs) == len(set(outs))


def test_an_installed_package_without_a_graph_counts_as_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CODE", tmp_path)

    assert stage_code("train") == ["d2r_core", "tasks"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `dvc.lock` records every stage as done, with outs that nobody computed."""
    root = tmp_path_factory.mktemp("committed")
    copy_project(root)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    for out in (out for stage in STAGES.values() for out in dvc.outs(stage)):
        path = root / out / "accepted.json" if out == "reports/validation" else root / out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(out)
    dvc.ask(["commit", "--force"], Paths(root))
    return root


@pytest.fixture
def checkout(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "checkout")


@pytest.mark.parametrize(
    ("changed", "reruns"),
    [
        ("tasks/config/validation_errors.py", set()),
        ("tasks/tracking/runs.py", set()),
        ("d2r_core/attacks/pgd.py", {"pretrain", "train", "evaluate"}),
        ("d2r_core/evaluation/self_checks.py", {"evaluate"}),
    ],
)
def test_a_change_of_code_reruns_what_it_can_change(checkout: Path, changed: str, reruns: set[str]) -> None:
    with (checkout / changed).open("a", encoding="utf-8") as stream:
        stream.write("# another line\n")

    assert set(dvc.status(Paths(checkout))) == reruns


def test_compiled_code_changes_nothing(checkout: Path) -> None:
    for room in ("d2r_core/attacks", "tasks/data", "tasks/training"):
        (checkout / room / "__pycache__").mkdir()
        (checkout / room / "__pycache__/module.cpython-311.pyc").write_bytes(b"\0")

    assert dvc.status(Paths(checkout)) == {}
