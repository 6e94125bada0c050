"""A small DVC project with two fast stages, for the tests of everything around a stage."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from project import ROOT, clean_environment

from tasks.config.paths import Paths
from tasks.pipeline import dvc

# `first` writes first.txt from input.txt, and `second` writes second.txt and more.txt from first.txt. The file
# `behaviour` makes a stage fail, crash or sleep; it is not a dependency, so that DVC does not notice its changes.
STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path

name, source, *outs = sys.argv[1:]
behaviour = Path("behaviour").read_text().split() if Path("behaviour").exists() else []
print(f"{name}: one")
if name in behaviour and "fail" in behaviour:
    print("loss is 3.2", file=sys.stderr)
    sys.exit("error: the loss is NaN in step 7\\nlower train.learning_rate")
if name in behaviour and "document" in behaviour:
    for out in outs:
        Path(out).write_text("the report")
    sys.exit("error: no good")
if name in behaviour and "crash" in behaviour:
    raise ZeroDivisionError("a bug")
if name in behaviour and "sleep" in behaviour:
    Path(outs[0]).write_text("half")
    sleeper = subprocess.Popen(["sleep", "300"])
    if "stubborn" in behaviour:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path("pids.new").write_text(f"{os.getpid()} {sleeper.pid}")
    Path("pids.new").rename("pids")
    try:
        time.sleep(300)
    finally:
        Path("cleaned").touch()
if sys.stderr.isatty():
    for step in range(3):
        print(f"\\r{step}/2", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
print(f"{name}: two")
print(f"{name}: a warning", file=sys.stderr)
print(f"{name}: three")
for out in outs:
    Path(out).write_text(Path(source).read_text() + name)
"""


def make(folder: Path) -> Path:
    """Create the project in a folder, with the real `params.yaml` and DVC configuration, before any run."""
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in (".dvcignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "stage.py").write_text(STAGE)
    (folder / "input.txt").write_text("input ")
    stages = {
        # Not in the order of the graph.
        "second": {
            "cmd": "python stage.py second first.txt second.txt more.txt",
            "params": ["train"],
            "deps": ["first.txt"],
            "outs": ["second.txt"],
            "metrics": [{"more.txt": {"cache": True}}],
        },
        "first": {
            "cmd": "python stage.py first input.txt first.txt",
            "params": ["seed"],
            "deps": ["input.txt", "${prepare.path}"],
            "outs": ["first.txt"],
        },
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/README.md").write_text("Data.")
    return folder


def make_finished(folder: Path) -> Path:
    """The project after a successful run of both stages. `first` has run again since, so that `second` is outdated."""
    make(folder)
    for stage, content in (("first", "input "), ("second", "input "), ("first", "other ")):
        (folder / "input.txt").write_text(content)
        dvc.reproduce(stage, Paths(folder), print)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file of a project, except for those of git and DVC's temporary files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.parts and not path.is_relative_to(folder / ".dvc/tmp")
    }


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(folder: Path) -> list[int]:
    """The processes of a sleeping stage. Waits until it sleeps."""
    deadline = time.monotonic() + 120
    while not (folder / "pids").exists():
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.05)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def d2r(*arguments: str) -> list[str]:
    """The command line of `d2r ARGUMENTS` in this environment."""
    return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]


def environment() -> dict[str, str]:
    """The environment for `d2r` with the code under test in a scratch project, with no server configured."""
    return clean_environment(PYTHONPATH=str(ROOT))
