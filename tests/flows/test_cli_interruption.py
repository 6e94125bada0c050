"""An interrupted `d2r` ends all processes and restores the previous results."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import scratch_project as scratch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_stage_leaves_nothing_behind(finished_project: Path, number: signal.Signals) -> None:
    (finished_project / "behaviour").write_text("second sleep")
    before = scratch.tree(finished_project)
    running = subprocess.Popen(
        scratch.d2r("stage", "second"),
        cwd=finished_project,
        env=scratch.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = scratch.pids(finished_project)

    running.send_signal(number)
    _, errors = running.communicate()

    assert running.returncode == 130
    assert errors == "interrupted\n"
    assert not any(scratch.alive(pid) for pid in pids)
    for written in ("pids", "cleaned"):
        (finished_project / written).unlink()
    assert scratch.tree(finished_project) == before


def test_ctrl_c_ends_the_whole_flow_at_once(finished_project: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to its whole process group. No server is configured: the flow starts its own."""
    (finished_project / "behaviour").write_text("second sleep")
    log = tmp_path / "log"
    with log.open("w") as stream:
        running = subprocess.Popen(
            scratch.d2r("run"),
            cwd=finished_project,
            env=scratch.environment() | {"PREFECT_HOME": str(tmp_path / "prefect")},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pids = scratch.pids(finished_project)

        os.killpg(running.pid, signal.SIGINT)
        start = time.monotonic()
        assert running.wait() == 130

    assert time.monotonic() - start < 60
    assert not any(scratch.alive(pid) for pid in pids)
    assert (finished_project / "second.txt").read_text() == "input firstsecond"
    output = log.read_text()
    assert "The results of its last successful run are restored." in output
    assert "Finished in state Crashed" in output, "the flow could not report its final state to its server"
    assert "Traceback" not in output
    assert output.endswith("interrupted\n")
