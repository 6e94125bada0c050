"""A child process that never outlives us: its output line by line, its progress bars on our terminal."""

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

GRACE = 10.0  # seconds that an interrupted child has to clean up before it is killed


def run(
    command: list[str], *, cwd: Path, environment: Mapping[str, str], log: Callable[[str], None], terminal: bool
) -> tuple[int, list[str]]:
    """Run a command in a process group of its own; return its exit code and the lines it wrote.

    Lines go to `log` as they come. With `terminal`, the child's stderr is a terminal whose content is shown on ours at
    once, as progress bars need it; its lines stand at the end of those returned. Without, stderr and stdout are one
    stream, so that the order of the lines is kept.

    Any exception, Ctrl-C and timeouts among them, ends the whole process group before it goes on.
    """
    ours, stderr = _terminal() if terminal else (None, subprocess.STDOUT)
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
            if ours is not None:
                os.close(stderr)  # the child has it; we would never see its end
            lines = _relay(child.stdout.fileno(), ours, log)
            return child.wait(), lines
        except BaseException:
            _end(child)
            raise
        finally:
            if ours is not None:
                os.close(ours)


def _terminal() -> tuple[int, int]:
    """A terminal of our own terminal's size: our end and the child's."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, termios.tcgetwinsize(sys.stderr.fileno()))
    return ours, theirs


def _relay(stdout: int, terminal: int | None, log: Callable[[str], None]) -> list[str]:
    """Pass on what a child writes until it, and all that it started, have closed both."""
    said: list[str] = []
    rest = drawn = b""
    opened = [stdout] if terminal is None else [stdout, terminal]
    while opened:
        # One second at a time: a timeout that another thread raises in this one gets through between two calls only.
        for source in select.select(opened, [], [], 1.0)[0]:
            chunk = _read(source)
            if not chunk:
                opened.remove(source)
            elif source == terminal:
                os.write(sys.stderr.fileno(), chunk)
                drawn += chunk
            else:
                *complete, rest = (rest + chunk).split(b"\n")
                for line in _readable(complete):
                    said.append(line)
                    log(line)
    return [*said, *_readable([rest, *drawn.split(b"\n")])]


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # how Linux says that nobody writes to a terminal any more
        return b""


def _readable(raw: Iterable[bytes]) -> list[str]:
    """Lines without colours and blank ones; of a line that a progress bar redrew after "\\r", what stood there last."""
    text = (re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode(errors="replace")) for line in raw)
    drawn = (line.rstrip().rpartition("\r")[2] for line in text)
    return [line for line in drawn if line]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's process group: it first gets the chance to clean up, and nothing outlives it.

    DVC waits for its stage on SIGINT, but leaves it behind on SIGTERM, so that comes second.
    """
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, GRACE / 2), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        # A second Ctrl-C means: do not wait.
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(patience)
            break
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
