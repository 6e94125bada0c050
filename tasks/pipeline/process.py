"""Runs a child process that never outlives this one: passes on its output by lines and its progress bars."""

import os
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tasks.config.credentials import redact

GRACE = 10.0  # seconds for an interrupted child to clean up before it is killed


def run(
    command: list[str], *, cwd: Path, environment: Mapping[str, str], log: Callable[[str], None], terminal: bool
) -> tuple[int, list[str]]:
    """Run a command in its own process group; return its exit code and its output lines.

    Lines are passed to `log` immediately. With `terminal`, the child's stderr is a pseudo-terminal whose content is
    copied to our stderr at once, so that progress bars work; its lines come last in the result. Without `terminal`,
    stderr and stdout are one stream, so that the order of lines is preserved.

    Any exception, including Ctrl-C and timeouts, ends the whole process group before it propagates.
    """
    master, stderr = _open_terminal() if terminal else (None, subprocess.STDOUT)
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        try:
            if master is not None:
                os.close(stderr)  # or we would never see end-of-file after the child closes it
            lines = _relay(child.stdout.fileno(), master, log)
            return child.wait(), lines
        except BaseException:
            _terminate(child)
            raise
        finally:
            if master is not None:
                os.close(master)


def _open_terminal() -> tuple[int, int]:
    """The master and slave ends of a pseudo-terminal with the size of our own terminal."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, termios.tcgetwinsize(sys.stderr.fileno()))
    return master, slave


def _relay(stdout: int, terminal: int | None, log: Callable[[str], None]) -> list[str]:
    """Pass on the output until the child and all its descendants have closed both streams; return the lines."""
    lines: list[str] = []
    rest = from_terminal = b""
    opened = [stdout] if terminal is None else [stdout, terminal]
    while opened:
        # With a timeout, since an exception raised in this thread by another one is only delivered between calls.
        for source in select.select(opened, [], [], 1.0)[0]:
            chunk = _read(source)
            if not chunk:
                opened.remove(source)
            elif source == terminal:
                os.write(sys.stderr.fileno(), chunk)
                from_terminal += chunk
            else:
                *complete, rest = (rest + chunk).split(b"\n")
                for line in _readable(complete):
                    lines.append(line)
                    log(line)
    return [*lines, *_readable([rest, *from_terminal.split(b"\n")])]


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # Linux signals this way that a pseudo-terminal has no writer left
        return b""


def _readable(raw: Iterable[bytes]) -> list[str]:
    """Non-blank lines without colours and credentials; of a line that was redrawn after "\\r", the last version."""
    text = (re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode(errors="replace")) for line in raw)
    final = (line.rstrip().rpartition("\r")[2] for line in text)
    return [redact(line) for line in final if line]


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """End the child's process group: it can clean up first, and then every process of the group is killed.

    SIGTERM comes second: on SIGINT DVC waits for its stage, on SIGTERM it leaves the stage running.
    """
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGTERM, GRACE / 2), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        # A second Ctrl-C skips the wait.
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(seconds)
            break
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
