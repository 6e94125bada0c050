"""The flow `retrain` on a scratch project and a Prefect server of its own, with a fake registry and gate."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import robustness_json
import scratch_project as scratch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort

from d2r_core.errors import UserError
from flows import retrain as module
from flows import retraining
from flows.promotion import PromotionResult
from tasks import prefect_tasks
from tasks.config.paths import Paths
from tasks.pipeline import dvc, process
from tasks.registry import champion_comparison, status
from tasks.registry.decision import Rule
from tasks.registry.gate import Verdict
from tasks.registry.status import RegistryStatus
from tasks.tracking.errors import UnavailableError

pytestmark = pytest.mark.slow
RULE = Rule(name="robust", verdict="undecided", reason="0.9 against 0.8.", interval=(-0.01, 0.21))


@pytest.fixture
def project(prefect_server: None, finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an evaluated project with a fake registry and gate."""
    monkeypatch.chdir(finished_project)
    registered = RegistryStatus(3, ("challenger",), "passed", (), False, "7", "abc")
    monkeypatch.setattr(retraining, "registry_status", lambda settings, paths: registered)
    fake_gate(monkeypatch, passed=True)
    figures = {"clean": robustness_json.figures("clean", 0.975, 40, eps=0.0, interval=[0.871, 0.996])}
    passed = {"key": "logits", "name": "The outputs are logits", "passed": True, "found": ""}
    models = {name: robustness_json.model(name, figures, (passed,)) for name in ("guidance", "target")}
    robustness_json.write(finished_project / "reports/robustness.json", robustness_json.content(models))
    return finished_project


def fake_gate(monkeypatch: pytest.MonkeyPatch, *, passed: bool) -> None:
    verdict = Verdict(passed, ("Clean accuracy is 97.5%.",), (RULE,))
    result = PromotionResult(3, "champion" if passed else "challenger", verdict)
    monkeypatch.setattr(retraining, "promotion", lambda settings, paths: result)


@pytest.fixture
def logged() -> Iterator[list[tuple[str, str]]]:
    """The records of Prefect's run loggers: (task or flow run, message), including tracebacks."""
    records: list[tuple[str, str]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            traceback = "\nTraceback" if record.exc_info else ""
            records.append((getattr(record, "task_run_name", "flow"), record.getMessage() + traceback))

    loggers = [logging.getLogger(f"prefect.{kind}_runs") for kind in ("task", "flow")]
    handler = Collector()
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def last_run() -> tuple[FlowRun, list[TaskRun]]:
    """The newest flow run and its task runs; waits until the server has their final states."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        deadline = time.monotonic() + 30
        while True:
            tasks = client.read_task_runs(flow_run_filter=mine)
            if tasks and all(task.state and task.state.is_final() for task in tasks):
                return run, sorted(tasks, key=lambda task: str(task.start_time))
            assert time.monotonic() < deadline, f"the server does not have the final states: {tasks}"
            time.sleep(0.2)


def artifact_text(run: FlowRun) -> str:
    with get_client(sync_client=True) as client:
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        (artifact,) = client.read_artifacts(artifact_filter=mine)
    assert artifact.key == "robustness"
    return str(artifact.data)


def test_every_stage_is_a_task_with_its_output_in_its_log(project: Path, logged: list[tuple[str, str]]) -> None:
    result = module.retrain()

    assert result == PromotionResult(3, "champion", Verdict(True, ("Clean accuracy is 97.5%.",), (RULE,)))
    run, tasks = last_run()
    assert run.name.startswith("retrain 20")
    assert [(task.name, task.state and task.state.message) for task in tasks] == [
        ("first", "up to date"),
        ("second", "ran"),
    ]
    second = [message for name, message in logged if name == "second"]
    assert [message for message in second if message.startswith("second: ")] == [
        f"second: {line}" for line in ("one", "two", "a warning", "three")
    ]
    text = artifact_text(run)
    assert "# d2r-digits version 3 is @champion" in text
    assert "| clean | 0 | 40 of 40 | 97.5% [87.1, 99.6] | 97.5% [87.1, 99.6] |" in text
    assert "Self-checks of the target: all 1 passed" in text
    assert "**Gate passed**" in text
    assert "/#/experiments/7/runs/abc" in text


def test_a_model_that_does_not_pass_completes_the_flow(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gate(monkeypatch, passed=False)

    module.retrain()

    run, _ = last_run()
    assert run.state
    assert run.state.is_completed()
    assert "| robust | undecided | -1.00% to +21.00% | 0.9 against 0.8. |" in artifact_text(run)
    assert "**Gate not passed**\n\n- Clean accuracy is 97.5%." in artifact_text(run)


def test_with_nothing_to_do_the_flow_starts_no_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dvc.reproduce("second", Paths(project), print)
    registered = RegistryStatus(3, ("champion",), "passed", (), True, "7", "abc")
    monkeypatch.setattr(status, "registry_status", lambda settings, paths: registered)
    commands: list[list[str]] = []
    run_process = process.run

    def run(command: list[str], **options: Any) -> tuple[int, list[str]]:
        commands.append(command[1:])
        return run_process(command, **options)

    monkeypatch.setattr(process, "run", run)

    module.retrain()

    assert commands == [["-m", "dvc", "status", "--json"]]
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        assert client.read_task_runs(flow_run_filter=mine) == []
    assert flow_run.state
    assert flow_run.state.is_completed()
    assert flow_run.state.message == "Everything is up to date: d2r-digits version 3 @champion."


def test_a_failed_stage_fails_the_flow_with_one_message(project: Path, logged: list[tuple[str, str]]) -> None:
    (project / "behaviour").write_text("second fail")

    with pytest.raises(UserError, match=r"^stage 'second' failed: the loss is NaN in step 7\n"):
        module.retrain()

    run, tasks = last_run()
    assert run.state
    assert run.state.is_failed()
    assert str(run.state.message).startswith("stage 'second' failed: the loss is NaN in step 7")
    assert [task.run_count for task in tasks] == [1, 1]
    assert not any("Traceback" in message for _, message in logged)
    assert (project / "second.txt").read_text() == "input firstsecond"


def test_a_mistyped_parameter_fails_the_flow_and_changes_nothing(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("clean_weight:", "clean_wait:"))
    before = scratch.tree(project)

    with pytest.raises(UserError, match="Did you mean 'clean_weight'"):
        module.retrain()

    assert scratch.tree(project) == before


def test_a_stage_is_retried_only_while_another_dvc_process_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Exception | str] = [dvc.BusyError("busy"), "ran", UserError("no good")]

    def reproduce(*_: object) -> str:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(dvc, "reproduce", reproduce)
    monkeypatch.setattr(dvc, "order", lambda paths: ["first", "second"])

    with pytest.raises(UserError, match="no good"):
        module.retrain()

    _, tasks = last_run()
    assert [(task.name, task.run_count) for task in tasks] == [("first", 2), ("second", 1)]


@pytest.mark.parametrize("available", [True, False])
def test_the_champion_is_compared_before_the_report_if_mlflow_is_available(
    project: Path, monkeypatch: pytest.MonkeyPatch, logged: list[tuple[str, str]], available: bool
) -> None:
    calls: list[str] = []

    def compare(*_: object) -> str:
        calls.append("compare")
        if not available:
            raise UnavailableError("MLflow is not available.")
        return "No difference."

    def reproduce(stage: str, *_: object) -> str:
        calls.append(stage)
        return "ran"

    monkeypatch.setattr(champion_comparison, "compare", compare)
    monkeypatch.setattr(dvc, "reproduce", reproduce)
    monkeypatch.setattr(dvc, "order", lambda paths: ["evaluate", "report"])
    monkeypatch.setattr(retraining, "compare", prefect_tasks.compare.with_options(retry_delay_seconds=0))

    module.retrain()

    run, _ = last_run()
    assert run.state
    assert run.state.is_completed()
    assert calls == ["evaluate", *["compare"] * (1 if available else 3), "report"]
    if available:
        assert "No difference." in [message for _, message in logged]
    else:
        assert (
            "flow",
            "The report will not have a new comparison with the champion. MLflow is not available.",
        ) in logged


def test_a_timeout_ends_the_stage_and_its_child_processes(project: Path) -> None:
    (project / "behaviour").write_text("second sleep")

    @flow
    def with_timeout() -> None:
        prefect_tasks.reproduce.with_options(timeout_seconds=8)("second")

    with pytest.raises(TimeoutError):
        with_timeout()

    assert not any(scratch.alive(pid) for pid in scratch.pids(project))
    assert (project / "second.txt").read_text() == "input firstsecond"
