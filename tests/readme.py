"""The command lines of the README, and someone who runs them."""

import contextlib
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
import warnings
from pathlib import Path

from mlflow_server import free_port
from project import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("make", "source", "d2r", "dvc", "mlflow", "prefect", "torchrun", "python", "pip", ".venv/bin/pre-commit")

# What is not run, and why.
NOT_RUN = {
    "make demo": "sets the machine up, and then runs `d2r run`, which is run",
    "make test": "sets the machine up, and then runs these tests",
    "make help": "tests/test_project.py runs it",
    "make check": "tests the whole project, as CI does",
    "pip install dvc-s3": "sets the machine up",
    ".venv/bin/pre-commit install": "sets the machine up",
    "torchrun --nproc-per-node 8 -m tasks.train": "needs several GPUs",
    "dvc commit train": "follows the training on several GPUs",
}
# Blocks of code that are no commands, by their first line.
OUTPUT = "Accuracy under attack (Linf)"
LAYOUT = "flows/      Prefect flows and the command-line interface `d2r`"
PYTHON = "import torch"


def blocks() -> list[list[str]]:
    """The lines of each indented block of code, without the indentation."""
    matches = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n").splitlines() for block in matches]


def command_blocks() -> list[list[str]]:
    return [block for block in blocks() if block[0].strip() not in (OUTPUT, LAYOUT, PYTHON)]


def python_block() -> str:
    (block,) = (block for block in blocks() if block[0] == PYTHON)
    return "\n".join(block)


def command_lines(block: list[str]) -> list[str]:
    """The commands of a block, without comments; a continued line is one command."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(block))
    return [line for line in (re.sub(r"\s+#.*", "", line) for line in joined.splitlines()) if line]


def inline_commands() -> list[str]:
    """The commands in the text and in comments that have arguments, without those that are in a block as well."""
    spans = re.findall(r"`([^`\n]+)`", README)
    in_blocks = {line for block in command_blocks() for line in command_lines(block)}
    return [span for span in dict.fromkeys(spans) if is_command(span) and span not in in_blocks]


def is_command(line: str) -> bool:
    return re.sub(r"^(?:[A-Z_]+=\S+ )*", "", line).startswith(tuple(f"{program} " for program in PROGRAMS))


class Reader:
    """Runs commands in a project whose folder `.venv` is the environment of this process.

    Args:
        values: what this reader has in place of the README's examples, by a regular expression.
    """

    def __init__(self, root: Path, environment: dict[str, str], values: dict[str, str]) -> None:
        self.root, self.values = root, values
        self.environment = {**environment, "PYTHONPATH": str(root), "MLFLOW_PORT": str(free_port())}
        (root / ".venv").symlink_to(sys.prefix)

    def filled_in(self, line: str) -> str:
        for pattern, value in self.values.items():
            line = re.sub(pattern, value, line)
        return line

    def run(self, line: str, code: int = 0) -> str:
        """The output of a command; `d2r` is run in a fork of this process, which has imported everything already."""
        started = time.monotonic()
        command = self.filled_in(line)
        ended, output = self._fork(command) if command.startswith("d2r ") else self._shell(command)
        print(f"{time.monotonic() - started:6.1f} s  {command}", flush=True)
        assert ended == code, f"{command}\nended with {ended}:\n{output}"
        assert "Traceback" not in output, f"{command}\n{output}"
        return output

    def serve(self, line: str, path: str) -> bytes:
        """The response of a server to a request for `path`; the server is ended then."""
        started = time.monotonic()
        command = self.filled_in(line)
        port = re.search(r"--port (\d+)", command)
        url = f"http://127.0.0.1:{port[1] if port else self.environment['MLFLOW_PORT']}{path}"
        server = subprocess.Popen(
            self._bash(command),
            cwd=self.root,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while True:
                assert server.poll() is None, f"{command}\nended with {server.returncode}"
                assert time.monotonic() < started + 120, f"{command}\ndoes not answer"
                with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
                    return bytes(response.read())
                time.sleep(0.2)
        finally:
            print(f"{time.monotonic() - started:6.1f} s  {command}", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()

    def _bash(self, command: str) -> list[str]:
        return ["bash", "-ec", f"source .venv/bin/activate; {command}"]

    def _shell(self, command: str) -> tuple[int, str]:
        process = subprocess.run(
            self._bash(command),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return process.returncode, process.stdout

    def _fork(self, command: str) -> tuple[int, str]:
        output = self.root.parent / "output.txt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
            child = multiprocessing.get_context("fork").Process(target=self._d2r, args=(shlex.split(command), output))
            child.start()
        child.join(300)
        assert child.exitcode is not None, f"{command} does not end"
        return child.exitcode, output.read_text(encoding="utf-8")

    def _d2r(self, arguments: list[str], output: Path) -> None:
        from flows import cli

        os.environ.clear()
        os.environ.update(self.environment)
        os.environ["PATH"] = f"{self.root}/.venv/bin:{os.environ['PATH']}"
        os.chdir(self.root)
        stream = output.open("w", encoding="utf-8")
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        sys.stdout = sys.stderr = stream
        sys.argv = arguments
        try:
            cli.main()
        finally:
            stream.flush()
