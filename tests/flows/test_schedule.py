"""The deployment in `prefect.yaml`, with a real server and a real worker on localhost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from project import ROOT, clean_environment, copy_project

pytestmark = pytest.mark.slow


@contextmanager
def running(*arguments: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """`prefect ARGUMENTS` in the background, outside of the project; ended with all its child processes."""
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=log.parent,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_for(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.5)


@pytest.fixture
def project(tmp_path: Path, tiny_values: dict[str, Any]) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    copy_project(folder)
    shutil.copy(ROOT / "prefect.yaml", folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_values), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def test_the_deployment_is_scheduled_and_a_worker_runs_it(project: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = clean_environment(
        PREFECT_HOME=str(tmp_path / "prefect"),
        PREFECT_API_URL=url,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_WORKER_QUERY_SECONDS="1",
        DO_NOT_TRACK="1",
    )
    server_log, worker_log = tmp_path / "server.log", tmp_path / "worker.log"

    def prefect(*arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    with (
        running("server", "start", "--port", str(port), environment=environment, log=server_log),
        httpx.Client(base_url=url, timeout=30) as client,
    ):

        def get(path: str) -> Any:
            """The server's response, or None while it is not available or the object does not exist."""
            with suppress(httpx.TransportError):
                response = client.get(path)
                return response.json() if response.is_success else None
            return None

        wait_for(lambda: bool(get("/health")), 120, server_log)
        # The worker creates the work pool of the deployment.
        worker = ("worker", "start", "--pool", "d2r", "--type", "process")
        with running(*worker, environment=environment, log=worker_log):
            wait_for(lambda: bool(get("/work_pools/d2r")), 60, worker_log)
            prefect("--no-prompt", "deploy", "--all")

            [schedule] = get("/deployments/name/retrain/retrain")["schedules"]
            assert schedule["active"]
            assert schedule["schedule"]["cron"] == "0 3 * * 1"
            assert schedule["schedule"]["timezone"] == "UTC"

            output = prefect("deployment", "run", "retrain/retrain")
            run = re.findall(r"UUID: (\S+)", output)[0]

            def state() -> str:
                return str((get(f"/flow_runs/{run}") or {}).get("state_type"))

            wait_for(lambda: state() in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}, 300, worker_log)
            assert state() == "COMPLETED", worker_log.read_text()
            assert (project / "reports/report.html").is_file()

            # The server schedules the coming Mondays.
            scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
            planned = client.post("/flow_runs/filter", json=scheduled).json()
            starts = [datetime.fromisoformat(run["expected_start_time"]).astimezone(UTC) for run in planned]
            assert starts, server_log.read_text()
            assert {(start.weekday(), start.hour, start.minute) for start in starts} == {(0, 3, 0)}
