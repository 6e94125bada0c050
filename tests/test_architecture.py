"""The arrows between the packages: flows -> tasks -> d2r_core -> torch, numpy, safetensors and the standard library."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE_NEEDS = ["torch", "numpy", "safetensors"]

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


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(module: Path) -> Iterator[str]:
    """The top-level names of what a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0] if node.module and not node.level else module.relative_to(ROOT).parts[0]


def requirements(names: list[str]) -> set[str]:
    """The installed distributions that these need, with themselves; names in their canonical form."""
    found: set[str] = set()
    while names:
        name = canonical(names.pop())
        if name not in found:
            try:
                required = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform, or of an extra
                continue
            found.add(name)
            names += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("module", modules("d2r_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_only_tensors_and_files(module: Path) -> None:
    assert set(imported(module)) <= {"d2r_core", *CORE_NEEDS, *sys.stdlib_module_names}


@pytest.mark.parametrize("module", modules("tasks"), ids=lambda path: str(path.relative_to(ROOT)))
def test_tasks_do_not_know_the_flows(module: Path) -> None:
    assert "flows" not in imported(module)


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
    parts = [module.relative_to(ROOT).with_suffix("").parts for module in modules("d2r_core")]
    expected = {".".join(part for part in names if part != "__init__") for names in parts} - {"d2r_core"}
    assert set(child.stdout.split()) == expected
