"""Which of the project's files import which, read from their syntax: for the tests of the graph and of the arrows."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("d2r_core", "tasks", "flows")


def source_files(package: str) -> list[str]:
    """The Python files of a package, relative to the project's root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py"))


@functools.cache
def syntax(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def imported_modules(path: str) -> frozenset[str]:
    """The dotted names that a file imports, wherever in it the import is; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: imports are absolute in this project"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@functools.cache
def imported_files(path: str) -> frozenset[str]:
    """The project's files that an import in `path` runs; an `__init__.py` that is a docstring alone does not count."""
    names = imported_modules(path)
    packages = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    return frozenset(
        file
        for name in packages
        if name.split(".")[0] in PACKAGES
        for file in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
        if (ROOT / file).is_file() and holds_code(file)
    )


def holds_code(path: str) -> bool:
    return any(not isinstance(node, ast.Expr) for node in syntax(path).body)
