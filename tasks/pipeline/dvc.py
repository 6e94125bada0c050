"""Asks DVC for one stage: the order out of `dvc.yaml`, the run, and what is left behind when it fails.

DVC alone decides what is up to date. Nothing here imports DVC: it runs as a child, as a person would run it.
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

Outcome = Literal["ran", "restored", "up to date"]  # restored: DVC remembered a run with the same inputs


class BusyError(UserError):
    """Another DVC process holds what this one needs: the one failure that a retry can mend."""


def order(paths: Paths) -> list[str]:
    """The stages of `dvc.yaml`, each after those whose outs it needs. Raises UserError if there is no `dvc.yaml`."""
    return list(TopologicalSorter(upstream(paths)).static_order())


def upstream(paths: Paths) -> dict[str, set[str]]:
    """For every stage, the stages whose outs it needs."""
    stages = _stages(paths)
    return {
        name: {maker for dep in stage.get("deps", []) if (maker := _maker(dep, stages))}
        for name, stage in stages.items()
    }


def outs(stage: dict[str, Any]) -> list[str]:
    """The paths that a stage, as `dvc.yaml` describes it, makes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    # With options an entry is a mapping of one path.
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def status(paths: Paths) -> dict[str, Any]:
    """DVC's own answer to what is not up to date: stage -> reasons; empty if everything is.

    Raises:
        BusyError: a stage is running.
        UserError: DVC cannot tell; the message is its own.
    """
    said = ask(["status", "--json"], paths)
    answer: dict[str, Any] = json.loads(next(line for line in reversed(said) if line.startswith("{")))
    return answer


def recorded(paths: Paths) -> set[str]:
    """The stages of which `dvc.lock` records a good run."""
    if not paths.dvc_lock.is_file():
        return set()
    return set(yaml.safe_load(paths.dvc_lock.read_text(encoding="utf-8"))["stages"])


def cache(paths: Paths) -> str:
    """The folder where DVC keeps the contents of all outs."""
    return ask(["cache", "dir"], paths)[-1]


def ask(arguments: list[str], paths: Paths) -> list[str]:
    """Run `dvc ARGUMENTS` in the project and return the lines it wrote. Raises UserError with DVC's own words."""
    code, said = _dvc(arguments, paths)
    if code:
        raise _error(said)
    return said


def reproduce(stage: str, paths: Paths, log: Callable[[str], None]) -> Outcome:
    """Run one stage through `dvc repro --single-item`, unless DVC finds it up to date.

    Every line that the stage prints goes to `log` as it comes; progress bars go to the terminal if there is one.
    DVC deletes a stage's outs before it runs: when the stage fails or is interrupted (Ctrl-C, termination, a timeout),
    its whole process group is ended and the outs of its last good run are put back.

    Raises:
        BusyError: another DVC process is at work on the same files; nothing was touched.
        UserError: the parameters, an input or the stage itself is at fault; carries what the stage said last.
    """
    stages = _stages(paths)
    if stage not in stages:
        close = difflib.get_close_matches(stage, stages, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"there is no stage {stage!r}.{hint} The stages are: {', '.join(order(paths))}.")
    # Both checks come before DVC, which would have deleted the outs by the time it finds the mistake.
    _check_inputs(stage, stages, settings_file.load(paths.params), paths)
    running = True

    def relay(line: str) -> None:
        nonlocal running
        # What DVC says after the stage is advice on git, six times in a chain.
        running = running and line not in ("Generating lock file 'dvc.lock'", "Updating lock file 'dvc.lock'")
        if running:
            log(line)

    try:
        code, said = _dvc(["repro", "--single-item", stage], paths, relay, terminal=sys.stderr.isatty())
    except BaseException:
        log(f"stage {stage!r} was interrupted.{_restore(stage, paths)}".replace("\n", " "))
        raise
    if code == 0:
        if f"Stage '{stage}' didn't change, skipping" in said:
            return "up to date"
        return "restored" if f"Stage '{stage}' is cached - skipping run, checking out outputs" in said else "ran"
    error = _error(said)
    if isinstance(error, BusyError):
        raise error
    # A stage that failed with all its outs in place meant them to be read: the documents of a failed validation.
    complete = all((paths.root / out).exists() for out in outs(stages[stage]))
    raise UserError(f"stage {stage!r} failed: {error}{'' if complete else _restore(stage, paths)}")


def _stages(paths: Paths) -> dict[str, dict[str, Any]]:
    file = paths.root / "dvc.yaml"
    if not file.is_file():
        raise UserError(f"there is no dvc.yaml in {paths.root.resolve()}: run this in the project's own folder.")
    stages: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    return stages


def _maker(dep: str, stages: dict[str, dict[str, Any]]) -> str | None:
    """The stage that makes `dep`: one of its outs is `dep`, or a folder that holds it."""
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
        if maker := _maker(dep, stages):
            raise UserError(
                f"stage {stage!r} needs {path}, which stage {maker!r} makes: run `d2r stage {maker}` first."
            )
        if record := _record(path, paths):
            _pull(record, path, paths)
            continue
        key = re.search(r"\$\{(.+?)\}", dep)
        where = f"params.yaml: {key[1]} is {path!r}" if key else f"stage {stage!r} needs {path}"
        raise UserError(f"{where}, which does not exist.")


def _record(path: str, paths: Paths) -> str | None:
    """The `.dvc` file that keeps `path`, or a folder above it, under DVC; None if there is none."""
    places = [PurePosixPath(path), *PurePosixPath(path).parents]
    return next((f"{place}.dvc" for place in places if place.name and (paths.root / f"{place}.dvc").is_file()), None)


def _pull(record: str, path: str, paths: Paths) -> None:
    """Fetch data that is under DVC and not here, from the cache or the remote."""
    try:
        ask(["pull", record], paths)
    except BusyError:
        raise
    except UserError as error:
        said = str(error).partition("\n")[0]
        more = "" if "Checkout failed" in said else f" DVC says: {said}"
        raise UserError(
            f"{path}: is under DVC ({record}), and neither the cache here nor the remote has its content. Run "
            f"`dvc push` where the data is, or name its remote (`dvc remote add -d`).{more}"
        ) from None


def _restore(stage: str, paths: Paths) -> str:
    """Put back the outs that `dvc.lock` records for the stage; return what became of them, as a line."""
    if stage not in recorded(paths):
        return ""
    code, said = _dvc(["checkout", "--force", stage], paths)
    if code:
        return f"\nIts last good results could not be put back: {_error(said)}"
    return "\nIts last good results are back in place."


def _error(said: list[str]) -> UserError:
    """What went wrong, from the last lines of DVC and of the stage in it."""
    dvc = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    if any("is busy" in line or "Unable to acquire lock" in line for line in dvc):
        return BusyError("another DVC process is at work here; wait for it to end. DVC says:\n" + "\n".join(said))
    own = [line for line in said if not line.startswith(("ERROR: ", "Running stage ", "> "))]
    # A stage says what a user can mend as "error: ..." (tasks/config/entry_point.py); all else is shown as it stands.
    starts = [number for number, line in enumerate(own) if line.startswith("error: ")]
    if starts:
        return UserError("\n".join(own[starts[-1] :]).removeprefix("error: "))
    return UserError("\n".join([*dvc, *own[-20:]]))


def _dvc(
    arguments: list[str], paths: Paths, log: Callable[[str], None] = lambda line: None, *, terminal: bool = False
) -> tuple[int, list[str]]:
    """Run `dvc ARGUMENTS` in the project; return its exit code and the lines it wrote."""
    # This environment's own `python` first, lines as they are printed, and a shell without a person's own settings.
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "SHELL": "/bin/sh"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return process.run(command, cwd=paths.root, environment=environment, log=log, terminal=terminal)
