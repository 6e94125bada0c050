"""Measurements that are programs of their own: what each printed is its figure, kept once it has ended well."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_recipe import Stop

from d2r_core.files import write_text
from d2r_core.interruption import Interrupted

ROOT = Path(__file__).parents[1]


def run(programs: Mapping[str, list[str]], where: Path, stop: Stop) -> None:
    """Run those that have not ended yet, one after the other.

    One that fails is a finding, noted with its last line, and does not keep the others from running.

    Raises:
        Interrupted: the running one is ended, and starts anew in the next slice.
    """
    for name, arguments in programs.items():
        path = _said(where, name)
        if path.exists():
            continue
        print(f"{name}: {' '.join(arguments)}", flush=True)
        with tempfile.TemporaryFile("w+") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while child.poll() is None:
                    if reason := stop():
                        raise Interrupted(f"{reason}; {name} starts anew when it is run again.")
                    time.sleep(0.2)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            output.seek(0)
            said = output.read().strip()
        print(said, flush=True)
        if child.returncode:
            last = said.splitlines()[-1] if said else "no output"
            said = f"**Failed** (exit code {child.returncode}): `{last[:300]}`"
        write_text(path, said + "\n")


def figures(programs: Mapping[str, list[str]], where: Path) -> str:
    """What those that have ended said."""
    parts = [(name, _said(where, name)) for name in programs]
    return "\n\n".join(
        f"**{name}**\n\n{path.read_text(encoding='utf-8').strip()}" for name, path in parts if path.exists()
    )


def _said(where: Path, name: str) -> Path:
    return where / f"{name.replace(' ', '_').replace(',', '')}.md"
