"""DVC's remotes: which one is the default, and whether it has what was made here."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from d2r_core.errors import UserError
from tasks.config.credentials import without_credentials
from tasks.config.paths import Paths
from tasks.pipeline import dvc

_TIMEOUT = 60.0  # seconds for a remote to answer; one that swallows packets must not hold up a registration


class Remote(NamedTuple):
    """A configured DVC remote."""

    name: str
    url: str  # without credentials; absolute, where it is a folder
    default: bool


def remotes(paths: Paths) -> list[Remote]:
    """The remotes of all of DVC's configuration files; none outside of a DVC project."""
    if not (paths.root / ".dvc").is_dir():
        return []
    # Not `dvc remote list`, which breaks long lines.
    values = dict(line.split("=", 1) for line in dvc.run_dvc(["config", "--list"], paths) if "=" in line)
    urls = {match[1]: url for key, url in values.items() if (match := re.fullmatch(r"remote\.(.+)\.url", key))}
    return [
        Remote(name, without_credentials(url), name == values.get("core.remote")) for name, url in sorted(urls.items())
    ]


def is_pushed(targets: Sequence[str], paths: Paths) -> bool | None:
    """Whether the default remote has everything of these stages and `.dvc` files; None if it does not answer.

    It is asked for at most a minute.
    """
    command = [sys.executable, "-m", "dvc", "status", "--cloud", "--json", *targets]
    try:
        process = subprocess.run(command, cwd=paths.root, capture_output=True, text=True, check=True, timeout=_TIMEOUT)
        states = json.loads(next(line for line in reversed(process.stdout.splitlines()) if line.startswith("{")))
    except (OSError, subprocess.SubprocessError, StopIteration, ValueError):
        return None
    # "deleted" is there and was removed here.
    return not {"new", "missing"} & set(states.values())


def default_remote(paths: Paths) -> Remote | None:
    """The default remote, if one is configured."""
    try:
        return next((remote for remote in remotes(paths) if remote.default), None)
    except UserError:  # the configuration cannot be read, which every command of DVC says
        return None
