"""A real MLflow server, and a network before it that fails on demand."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import mlflow
from project import ROOT, clean_environment

STARTUP_SECONDS = 120  # of a model server, on a busy machine; an idle one takes a few seconds


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`mlflow server` on its own port, with its own database."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder, self.port, self.arguments, self.environment = folder, free_port(), arguments, environment
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("mlflow"), "server", "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *self.arguments,
            ],
            cwd=self.folder,
            env={
                **os.environ,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                **self.environment,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        """Does nothing to a server that was killed before."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with its worker
            self.process.wait()


class Proxy:
    """A TCP proxy that forwards everything, loses every response (`stall`), or refuses connections (`cut`)."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.port, self.stalled = target_port, free_port(), threading.Event()
        self.connections: list[socket.socket] = []
        self.restore()

    def restore(self) -> None:
        self.stalled.clear()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def stall(self) -> None:
        self.stalled.set()

    def cut(self) -> None:
        for connection in (self.listener, *self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target_port))
                self.connections += client, server
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, responses: bool) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                if not (responses and self.stalled.is_set()):
                    sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def model_server(model: str) -> Iterator[httpx.Client]:
    """`mlflow models serve` of a model such as models:/NAME@champion, in the present store; a client of its address."""
    port = free_port()
    command = Path(sys.executable).with_name("mlflow")
    process = subprocess.Popen(
        [command, "models", "serve", "-m", model, "--env-manager", "local", "--port", str(port)],
        env=clean_environment(
            MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
            PATH=f"{command.parent}:{os.environ['PATH']}",
            PYTHONPATH=str(ROOT),
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            deadline = time.monotonic() + STARTUP_SECONDS
            while not _answers(client):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the worker outlives its parent
        process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").is_success
    except httpx.TransportError:
        return False
