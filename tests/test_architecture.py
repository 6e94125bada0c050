"""The arrows between packages and between rooms, as docs/design.md draws them.

flows -> tasks -> d2r_core -> torch, numpy, safetensors and the standard library.
"""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import PurePosixPath

import pytest
from imports import PACKAGES, ROOT, holds_code, imported_files, imported_modules, source_files, syntax

CORE_NEEDS = ["torch", "numpy", "safetensors"]
# Errors and atomic files may be imported from everywhere: the table does not repeat them in each row.
IMPORTED_EVERYWHERE = {"d2r_core/errors.py", "d2r_core/files.py"}

# What the package imports when nothing else is installed: {1: names to hide}.
IMPORT_ALONE = """
import importlib, json, pkgutil, sys

class Hide:
    names = frozenset(json.loads(sys.argv[1]))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import d2r_core
for module in pkgutil.walk_packages(d2r_core.__path__, "d2r_core."):
    print(importlib.import_module(module.name).__name__)
"""


def room(path: str) -> str:
    """The room of a file: a folder of its package, or the file itself where it lies in none; `flows` is one room."""
    package, *parts = path.split("/")
    return package if package == "flows" else f"{package}/{parts[0]}"


def arrows() -> dict[str, set[str]]:
    """Each room with the other rooms that it imports."""
    result: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in source_files(package)):
        # A package's own `__init__.py` is a docstring.
        if path.count("/") > 1 or holds_code(path):
            result.setdefault(room(path), set()).update(map(room, imported_files(path)))
    return {name: imported - {name} for name, imported in result.items()}


def documented() -> dict[str, tuple[str, str]]:
    """The rows of docs/design.md that are about rooms: room -> (what it knows, what it may import)."""
    lines = (ROOT / "docs/design.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): (row[1], row[2]) for row in rows if len(row) == 3}


def in_words(imported: set[str]) -> str:
    """Rooms as the table names them: "tasks: config, data; d2r_core: attacks"."""
    groups = {
        package: sorted(PurePosixPath(name).stem for name in imported if name.startswith(f"{package}/"))
        for package in ("tasks", "d2r_core")
    }
    return "; ".join(f"{package}: {', '.join(names)}" for package, names in groups.items() if names) or "nothing"


def requirements(names: list[str]) -> set[str]:
    """The installed distributions that these need, with themselves; names in their canonical form."""
    needed: set[str] = set()
    while names:
        name = canonical(names.pop())
        if name not in needed:
            try:
                required = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform, or of an extra
                continue
            needed.add(name)
            names += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    return needed


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("module", source_files("d2r_core"))
def test_core_imports_only_tensors_and_files(module: str) -> None:
    packages = {name.partition(".")[0] for name in imported_modules(module)}

    assert packages <= {"d2r_core", *CORE_NEEDS, *sys.stdlib_module_names}


@pytest.mark.parametrize("module", source_files("tasks"))
def test_tasks_do_not_know_the_flows(module: str) -> None:
    assert "flows" not in {name.partition(".")[0] for name in imported_modules(module)}


@pytest.mark.parametrize("name", sorted(arrows()))
def test_a_room_imports_what_the_design_lists(name: str) -> None:
    knows, may_import = documented().get(name, ("what it knows", ""))

    imports = in_words(arrows()[name] - IMPORTED_EVERYWHERE)

    assert may_import == imports, f"docs/design.md must have the row\n| `{name}` | {knows} | {imports} |"


def test_the_design_lists_no_other_rooms() -> None:
    assert set(documented()) <= set(arrows())


def test_no_room_imports_itself_through_others() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError


@pytest.mark.parametrize("package", [path for root in PACKAGES for path in source_files(root) if "__init__" in path])
def test_a_room_has_a_sign(package: str) -> None:
    docstring = ast.get_docstring(syntax(package))

    assert docstring, "what the room knows, and what it may import"
    assert len(docstring.splitlines()) <= 4


def test_core_works_with_nothing_else_installed() -> None:
    allowed = requirements(list(CORE_NEEDS))
    hidden = [
        name
        for name, owners in metadata.packages_distributions().items()
        if name != "d2r_core" and not allowed & {canonical(owner) for owner in owners}
    ]
    assert {"tasks", "flows", "yaml", "pydantic", "prefect", "mlflow", "dvc", "great_expectations"} <= set(hidden)

    child = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE, json.dumps(hidden)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert child.returncode == 0, child.stderr
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in source_files("d2r_core")
    }
    assert set(child.stdout.split()) == modules - {"d2r_core"}
