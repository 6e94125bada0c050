"""Runs single stages through DVC: their order from `dvc.yaml`, the run itself, and the clean-up after a failure.

DVC alone decides what is up to date. It is not imported, but runs as a child process, as on the command line.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.pipeline import process

StageResult = Literal["ran", "restored", "up to date"]  # restored: from DVC's cache of runs with the same inputs


class BusyError(UserError):
    """Another DVC process holds a lock that is needed: the one failure that a retry can fix."""


def order(paths: Paths) -> list[str]:
    """The stages of `dvc.yaml`, each after those whose outs it depends on. Raises UserError without a `dvc.yaml`."""
    return list(TopologicalSorter(upstream(paths)).static_order())


def upstream(paths: Paths) -> dict[str, set[str]]:
    """For every stage, the stages whose outs it depends on."""
    stages = _stages(paths)
    return {
        name: {producer for dep in stage.get("deps", []) if (producer := _producer(dep, stages))}
        for name, stage in stages.items()
    }


def outs(stage: dict[str, Any]) -> list[str]:
    """The output paths of a stage of `dvc.yaml`."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    # With options an entry is a mapping of one path.
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def status(paths: Paths) -> dict[str, Any]:
    """The stages that are not up to date, with DVC's reasons; empty if all are.

    Raises:
        BusyError: a stage is running.
        UserError: `dvc status` failed; contains its message.
    """
    lines = run_dvc(["status", "--json"], paths)
    changed: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return changed


def outdated_inputs(stage: str, paths: Paths) -> list[str]:
    """The stages before `stage`, in their order, that are not up to date."""
    before, producers = {stage}, upstream(paths)
    for name in reversed(order(paths)):
        if name in before:
            before |= producers[name]
    changed = status(paths)
    return [name for name in order(paths) if name in before - {stage} and name in changed]


def recorded(paths: Paths) -> set[str]:
    """The stages with a successful run in `dvc.lock`."""
    if not paths.dvc_lock.is_file():
        return set()
    return set(yaml.safe_load(paths.dvc_lock.read_text(encoding="utf-8"))["stages"])


def cache_folder(paths: Paths) -> str:
    """The folder in which DVC stores the contents of all outs."""
    return run_dvc(["cache", "dir"], paths)[-1]


def run_dvc(arguments: list[str], paths: Paths) -> list[str]:
    """Run `dvc ARGUMENTS` in the project and return its output lines. Raises UserError with DVC's message."""
    code, lines = _execute(arguments, paths)
    if code:
        raise _error(lines)
    return lines


def reproduce(stage: str, paths: Paths, log: Callable[[str], None]) -> StageResult:
    """Run one stage with `dvc repro --single-item`, unless DVC considers it up to date.

    Every output line of the stage is passed to `log` immediately; progress bars go to the terminal if there is one.
    DVC deletes the outs of a stage before it runs. If the stage fails or is interrupted (Ctrl-C, termination, timeout),
    its whole process group is terminated and the outs of its last successful run are restored.

    Raises:
        BusyError: another DVC process is working on the same files; nothing was changed.
        UserError: the parameters, an input or the stage itself failed; contains the last output of the stage.
    """
    stages = _stages(paths)
    if stage not in stages:
        close = difflib.get_close_matches(stage, stages, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"there is no stage {stage!r}.{hint} The stages are: {', '.join(order(paths))}.")
    # Both checks come before DVC, which deletes the outs before it detects these errors.
    _check_inputs(stage, stages, settings_file.load(paths.params), paths)
    try:
        code, lines = _execute(["repro", "--single-item", stage], paths, _of_stage(log), terminal=sys.stderr.isatty())
    except BaseException:
        log(f"stage {stage!r} was interrupted.{_restore(stage, paths)}".replace("\n", " "))
        raise
    if code == 0:
        if f"Stage '{stage}' didn't change, skipping" in lines:
            return "up to date"
        return "restored" if f"Stage '{stage}' is cached - skipping run, checking out outputs" in lines else "ran"
    error = _error(lines)
    if isinstance(error, BusyError):
        raise error
    # A stage that fails with all its outs written intends them to be read: the reports of a failed validation.
    complete = all((paths.root / out).exists() for out in outs(stages[stage]))
    raise UserError(f"stage {stage!r} failed: {error}{'' if complete else _restore(stage, paths)}")


def run_again(stage: str, paths: Paths, log: Callable[[str], None]) -> None:
    """Run one stage, whatever DVC considers up to date, and without its cache of runs. The outs are deleted first.

    Raises:
        BusyError: another DVC process is working on the same files.
        UserError: an input or the stage itself failed; contains the last output of the stage.
    """
    arguments = ["repro", "--single-item", "--force", stage]
    code, lines = _execute(arguments, paths, _of_stage(log), terminal=sys.stderr.isatty())
    if code:
        error = _error(lines)
        raise error if isinstance(error, BusyError) else UserError(f"stage {stage!r} failed: {error}")


def dvc_file(path: str, paths: Paths) -> str | None:
    """The `.dvc` file that tracks `path` or a folder above it; None if there is none."""
    candidates = [f"{each}.dvc" for each in (PurePosixPath(path), *PurePosixPath(path).parents) if each.name]
    return next((candidate for candidate in candidates if (paths.root / candidate).is_file()), None)


def _of_stage(log: Callable[[str], None]) -> Callable[[str], None]:
    """`log` for the lines of the stage alone: after it, DVC only prints advice about git, once per stage."""
    running = True

    def relay(line: str) -> None:
        nonlocal running
        running = running and line not in ("Generating lock file 'dvc.lock'", "Updating lock file 'dvc.lock'")
        if running:
            log(line)

    return relay


def _stages(paths: Paths) -> dict[str, dict[str, Any]]:
    file = paths.root / "dvc.yaml"
    if not file.is_file():
        raise UserError(f"there is no dvc.yaml in {paths.root.resolve()}: run this in the project's own folder.")
    stages: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    return stages


def _producer(dep: str, stages: dict[str, dict[str, Any]]) -> str | None:
    """The stage that produces `dep`: one of its outs is `dep` or a folder that contains it."""
    for name, stage in stages.items():
        if any(PurePosixPath(dep).is_relative_to(out) for out in outs(stage)):
            return name
    return None


def _check_inputs(stage: str, stages: dict[str, dict[str, Any]], settings: Settings, paths: Paths) -> None:
    values = settings.flat()
    for dep in stages[stage].get("deps", []):
        path = re.sub(r"\$\{(.+?)\}", lambda key: str(values[key[1]]), dep)
        if (paths.root / path).exists():
            continue
        if producer := _producer(dep, stages):
            raise UserError(
                f"stage {stage!r} needs {path}, which stage {producer!r} produces: run `d2r stage {producer}` first."
            )
        if record := dvc_file(path, paths):
            _pull(record, path, paths)
            continue
        key = re.search(r"\$\{(.+?)\}", dep)
        where = f"params.yaml: {key[1]} is {path!r}" if key else f"stage {stage!r} needs {path}"
        raise UserError(f"{where}, which does not exist.")


def _pull(record: str, path: str, paths: Paths) -> None:
    """Fetch missing data that DVC tracks from the cache or the remote."""
    try:
        run_dvc(["pull", record], paths)
    except BusyError:
        raise
    except UserError as error:
        reason = str(error).partition("\n")[0]
        details = "" if "Checkout failed" in reason else f" DVC's message: {reason}"
        raise UserError(
            f"{path}: is tracked by DVC ({record}), but neither the local cache nor the remote has its content. Run "
            f"`dvc push` where the data is available, or configure the remote (`dvc remote add -d`).{details}"
        ) from None


def _restore(stage: str, paths: Paths) -> str:
    """Restore the outs of the stage's last run in `dvc.lock`; return one line for the message about the failure."""
    if stage not in recorded(paths):
        return ""
    code, lines = _execute(["checkout", "--force", stage], paths)
    if code:
        return f"\nThe results of its last successful run could not be restored: {_error(lines)}"
    return "\nThe results of its last successful run are restored."


def _error(lines: list[str]) -> UserError:
    """The error in the output of DVC and of the stage that it ran."""
    from_dvc = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any("is busy" in line or "Unable to acquire lock" in line for line in from_dvc):
        return BusyError(
            "another DVC process is running in this project; wait until it ends. DVC's message:\n" + "\n".join(lines)
        )
    from_stage = [line for line in lines if not line.startswith(("ERROR: ", "Running stage ", "> "))]
    # A stage reports a UserError as "error: ..." (tasks/config/entry_point.py); other output is shown unchanged.
    starts = [number for number, line in enumerate(from_stage) if line.startswith("error: ")]
    if starts:
        return UserError("\n".join(from_stage[starts[-1] :]).removeprefix("error: "))
    return UserError("\n".join([*from_dvc, *from_stage[-20:]]))


def _execute(
    arguments: list[str], paths: Paths, log: Callable[[str], None] = lambda line: None, *, terminal: bool = False
) -> tuple[int, list[str]]:
    """Run `dvc ARGUMENTS` in the project; return its exit code and its output lines."""
    # This environment's `python` first in PATH, unbuffered output, and a shell without the user's configuration.
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "SHELL": "/bin/sh"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return process.run(command, cwd=paths.root, environment=environment, log=log, terminal=terminal)
