"""A version that passed the gate waits for a person: a real Prefect server; the flow and `d2r` are processes."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.settings import PREFECT_API_URL
from project import ROOT, clean_environment
from registry_project import Project, make_project

from tasks.config.settings import Settings
from tasks.registry import history, moves, status
from tasks.registry.decision import Approval

pytestmark = pytest.mark.slow

# The end of the flow `retrain`; prints the version's alias and what a person decided.
FLOW = """
import flows.retrain
from prefect import flow
from flows.promotion import promotion
from tasks.config import settings
from tasks.config.paths import Paths

@flow(name="approval", validate_parameters=False)
def end_of_retraining():
    result = promotion(settings.load(Paths().params), Paths())
    print("RESULT", result.alias, result.approval and result.approval.state, result.verdict.passed)

end_of_retraining()
"""


@pytest.fixture
def project(
    prefect_server: None,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """An evaluated model that is not registered, and a person who must approve it."""
    project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    manual(project, minutes=30.0)
    project.train()
    project.evaluate()
    return project


def manual(project: Project, minutes: float) -> None:
    settings = project.with_settings(promote={"approval": "manual", "approval_minutes": minutes})
    project.paths.params.write_text(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True)))


def start(project: Project, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=project.paths.root,
        env=clean_environment(PYTHONPATH=str(ROOT), PREFECT_API_URL=str(PREFECT_API_URL.value())),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def flow(project: Project) -> Iterator[subprocess.Popen[str]]:
    child = start(project, "-c", FLOW)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


def d2r(project: Project, *arguments: str) -> str:
    child = start(project, "-c", "from flows.cli import main; main()", *arguments)
    output, _ = child.communicate(timeout=240)
    return output if child.returncode == 0 else f"{child.returncode} {output}"


def last_run(after: float) -> FlowRun | None:
    """The flow run that started after this time."""
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs() if run.created and run.created.timestamp() > after]
    return runs[0] if runs else None


def paused_run(child: subprocess.Popen[str], after: float) -> FlowRun:
    """The flow run of `child`, once it is paused."""
    deadline = time.monotonic() + 240
    while True:
        run = last_run(after)
        if run is not None and run.state is not None and run.state.is_paused():
            return run
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)


def result(child: subprocess.Popen[str]) -> str:
    """What the flow printed at its end."""
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, output
    return next(line.partition("RESULT ")[2] for line in output.splitlines() if "RESULT" in line)


def check_completed(run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_completed()


def approval(project: Project, version: int = 1) -> Approval:
    recorded = Approval.of(project.version(version))
    assert recorded is not None
    return recorded


def moves_of_the_champion(project: Project) -> list[tuple[int, str, str, str]]:
    entries = status.read_history(project.settings, project.paths)
    return [(entry.move.to_version, entry.move.command, entry.move.who, entry.move.reason) for entry in entries]


def test_the_flow_goes_on_when_the_command_approves(project: Project) -> None:
    after = time.time()
    with flow(project) as child:
        run = paused_run(child, after)
        assert project.champion() is None
        assert approval(project).state == "waiting"

        output = d2r(project, "approve", "1", "--reason", "Looks right.")

        assert output.startswith("digits version 1 is @champion.\nIf it still runs, the flow that waits goes on")
        assert result(child) == "champion approved True"
    check_completed(run)
    assert moves_of_the_champion(project) == [(1, "approve", history.local_user(), "Looks right.")]
    assert approval(project).state == "approved"
    with flow(project) as child:  # the champion needs no approval
        assert result(child) == "champion None True"


def test_the_flow_goes_on_when_prefects_ui_approves(project: Project) -> None:
    after = time.time()
    with flow(project) as child:
        run = paused_run(child, after)
        time.sleep(1)  # the schema of the form is saved just after the state
        with get_client(sync_client=True) as client:
            # As the UI does; without who and why the server refuses.
            assert client.resume_flow_run(run.id, run_input={"approve": True}).status == SetStateStatus.REJECT
            assert project.champion() is None
            answer = {"approve": True, "who": "Ada", "reason": "Better on blurred digits."}
            assert client.resume_flow_run(UUID(str(run.id)), run_input=answer).status == SetStateStatus.ACCEPT
        assert result(child) == "champion approved True"
    check_completed(run)
    assert moves_of_the_champion(project) == [(1, "approve", "Ada", "Better on blurred digits.")]
    assert approval(project).who == "Ada"


def test_a_rejection_leaves_the_champion_and_no_run_asks_again(project: Project) -> None:
    after = time.time()
    with flow(project) as child:
        run = paused_run(child, after)
        output = d2r(project, "approve", "1", "--reject", "--reason", "Fails on 7.")
        assert output.startswith("digits version 1 is rejected. `d2r approve 1 --reason TEXT` overrules it.\n")
        assert result(child) == "challenger rejected True"
    check_completed(run)
    assert project.champion() is None
    rejection = approval(project)
    assert (rejection.state, rejection.who, rejection.reason) == ("rejected", history.local_user(), "Fails on 7.")
    with flow(project) as child:
        assert result(child) == "challenger rejected True"
    with pytest.raises(
        moves.RefusedError, match=r"Rejected by .*: Fails on 7. `d2r approve 1 --reason TEXT` overrules"
    ):
        project.promote(1, force=False)

    assert d2r(project, "approve", "1", "--reason", "It does not.") == "digits version 1 is @champion.\n"

    assert approval(project).state == "approved"
    assert "1 error: digits version 1 is @champion already." in d2r(
        project, "approve", "1", "--reject", "--reason", "x"
    )


def test_without_an_answer_the_challenger_stays_one(project: Project) -> None:
    manual(project, minutes=0.1)
    after = time.time()
    with flow(project) as child:
        assert result(child) == "challenger expired True"
    run = last_run(after)
    assert run is not None
    check_completed(run)
    assert approval(project).state == "expired"
    assert project.champion() is None

    # No flow waits any more.
    assert d2r(project, "approve", "1", "--reason", "Late.") == "digits version 1 is @champion.\n"
    assert moves_of_the_champion(project) == [(1, "approve", history.local_user(), "Late.")]


def test_a_dead_flow_does_not_keep_a_version_from_being_approved(project: Project) -> None:
    after = time.time()
    with flow(project) as child:
        paused_run(child, after)
        child.kill()
        child.wait()
        assert "digits version 1 is @champion.\n" in d2r(project, "approve", "1", "--reason", "Looks right.")
    assert project.champion() == 1
    assert approval(project).state == "approved"
