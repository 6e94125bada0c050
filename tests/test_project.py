"""The project's own files: the lock, the commands, and what no committed file may contain."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from project import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The entries of the lock: each starts with a name at the beginning of a line.
LOCK = re.split(r"^(?=\w)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)
# Brackets, so that the patterns do not match themselves.
REGISTRY = re.compile(r"\b(?:pyp[i]\.org|pythonhos[t]ed\.org|npmj[s]\.(?:org|com)|download\.pytorc[h]\.org)")
MACHINE = re.compile(r"(?<![\w.])(?:/(?:home|root|Users|work)/\w|[A-Z]:\\\\?Users)")


def committed() -> list[Path]:
    """The files that git tracks, and the untracked files that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_everything_in_the_lock_has_a_version_and_a_hash() -> None:
    assert not LOCK[0]
    for entry in LOCK[1:]:
        assert re.match(r"[\w.-]+==[\w.]+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_the_lock_does_not_contain_package_sources() -> None:
    text = "".join(LOCK)
    assert "://" not in text
    assert not re.search(r"^\s*--(?!hash)", text, flags=re.MULTILINE)


def test_the_lock_satisfies_every_direct_dependency() -> None:
    # A package may have two entries, for two ranges of Python versions.
    locked = [Requirement(entry.partition("\\")[0]) for entry in LOCK[1:]]
    project = PYPROJECT["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"] + PYPROJECT["build-system"]["requires"]
    for needed in map(Requirement, lines):
        versions = [str(pin.specifier).removeprefix("==") for pin in locked if pin.name == needed.name]
        assert versions, f"run make lock: {needed}"
        assert all(needed.specifier.contains(version) for version in versions), f"run make lock: {needed}"


@pytest.mark.parametrize("pattern", [REGISTRY, MACHINE], ids=["registry", "machine"])
def test_no_committed_file_contains_a_registry_or_a_path_of_a_machine(pattern: re.Pattern[str]) -> None:
    matches = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in committed()
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not matches


def test_make_lists_its_commands() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make ([\w-]+)  +\S", listed, flags=re.MULTILINE) == [
        *("help", "setup", "demo", "test", "test-fast", "test-avx2", "check", "lock", "clean")
    ]


@pytest.mark.slow
def test_a_crashed_worker_fails_the_run(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"test_{name}.py").write_text("import os\ndef test_crash():\n    os.abort()\n")
    listed = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (options,) = re.findall(r" -m pytest (.+)", listed)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), "-c", "/dev/null", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    assert "worker restarting disabled" in run.stdout


def test_one_version_of_uv() -> None:
    makefile, dockerfile = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "Dockerfile"))
    assert re.findall(r"UV_VERSION := (\S+)", makefile) == re.findall(r"UV_VERSION=(\S+)", dockerfile)


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
