"""`tasks.pipeline.dvc` on a real DVC project with small stages: order, output, failure, interruption."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import scratch_project as scratch

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.pipeline import dvc, process


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return scratch.make(tmp_path)


@pytest.fixture
def busy_project(finished_project: Path) -> Iterator[Path]:
    """A finished project while `second` runs in another process."""
    (finished_project / "behaviour").write_text("second sleep")
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", "second"], cwd=finished_project, start_new_session=True
    )
    scratch.pids(finished_project)
    yield finished_project
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()


def test_the_order_is_that_of_the_graph_not_of_the_file(project: Path) -> None:
    assert dvc.order(Paths(project)) == ["first", "second"]


def test_a_folder_without_dvc_yaml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dvc\.yaml in .* project's own folder"):
        dvc.order(Paths(tmp_path))


def test_a_stage_runs_once_and_is_cached(project: Path) -> None:
    paths, lines = Paths(project), list[str]()

    assert dvc.reproduce("first", paths, lines.append) == "ran"
    # stdout and stderr in the order in which the stage wrote them, and without DVC's advice at the end.
    expected = ["first: one", "first: two", "first: a warning", "first: three"]
    assert lines == ["Running stage 'first':", "> python stage.py first input.txt first.txt", *expected]

    assert dvc.reproduce("first", paths, print) == "up to date"
    (project / "input.txt").write_text("other ")
    assert dvc.reproduce("first", paths, print) == "ran"
    (project / "input.txt").write_text("input ")
    assert dvc.reproduce("first", paths, print) == "restored"
    assert (project / "first.txt").read_text() == "input first"
    assert set(dvc.status(paths)) == {"second"}


def test_a_failed_stage_reports_its_reason_and_loses_nothing(finished_project: Path) -> None:
    (finished_project / "behaviour").write_text("second fail")
    before = scratch.tree(finished_project)

    with pytest.raises(UserError) as failure:
        dvc.reproduce("second", Paths(finished_project), print)

    assert str(failure.value).splitlines() == [
        "stage 'second' failed: the loss is NaN in step 7",
        "lower train.learning_rate",
        "The results of its last successful run are restored.",
    ]
    assert scratch.tree(finished_project) == before


def test_a_bug_is_shown_with_its_traceback(finished_project: Path) -> None:
    (finished_project / "behaviour").write_text("second crash")

    with pytest.raises(UserError, match=r"Traceback[\s\S]*ZeroDivisionError: a bug"):
        dvc.reproduce("second", Paths(finished_project), print)


def test_complete_outs_of_a_failed_stage_are_preserved(finished_project: Path) -> None:
    (finished_project / "behaviour").write_text("second document")

    with pytest.raises(UserError, match=r"^stage 'second' failed: no good$"):
        dvc.reproduce("second", Paths(finished_project), print)

    assert (finished_project / "second.txt").read_text() == "the report"


def test_a_mistyped_parameter_changes_nothing(finished_project: Path) -> None:
    params = finished_project / "params.yaml"
    params.write_text(params.read_text().replace("clean_weight:", "clean_wait:"))
    before = scratch.tree(finished_project)

    with pytest.raises(UserError, match=r"train\.method\.clean_wait is not a known key\. Did you mean 'clean_weight'"):
        dvc.reproduce("second", Paths(finished_project), print)

    assert scratch.tree(finished_project) == before


def test_a_missing_data_path_changes_nothing(finished_project: Path) -> None:
    params = finished_project / "params.yaml"
    params.write_text(params.read_text().replace("path: data/raw", "path: data/rwa"))
    before = scratch.tree(finished_project)

    with pytest.raises(UserError, match=r"^params.yaml: prepare.path is 'data/rwa', which does not exist\.$"):
        dvc.reproduce("first", Paths(finished_project), print)

    assert scratch.tree(finished_project) == before


def test_a_stage_without_its_inputs_names_the_stage_to_run_first(project: Path) -> None:
    with pytest.raises(UserError, match=r"needs first\.txt, which stage 'first' produces"):
        dvc.reproduce("second", Paths(project), print)


def test_an_unknown_stage_suggests_a_known_one(project: Path) -> None:
    with pytest.raises(UserError, match=r"no stage 'secnd'\. Did you mean 'second'"):
        dvc.reproduce("secnd", Paths(project), print)


def test_another_running_dvc_process_is_detected_and_not_disturbed(busy_project: Path) -> None:
    with pytest.raises(dvc.BusyError, match=r"another DVC process[\s\S]*PID"):
        dvc.reproduce("second", Paths(busy_project), print)
    with pytest.raises(dvc.BusyError):
        dvc.status(Paths(busy_project))

    assert (busy_project / "second.txt").read_text() == "half"
    assert all(scratch.alive(pid) for pid in scratch.pids(busy_project))


@pytest.mark.parametrize("ignores_signals", [False, True])
def test_an_interrupted_stage_leaves_no_process_and_no_partial_result(
    finished_project: Path, ignores_signals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished_project / "behaviour").write_text("second sleep stubborn" if ignores_signals else "second sleep")
    monkeypatch.setattr(process, "GRACE", 0.5 if ignores_signals else 10.0)
    lines: list[str] = []

    def interrupt() -> None:
        scratch.pids(finished_project)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        dvc.reproduce("second", Paths(finished_project), lines.append)

    assert not any(scratch.alive(pid) for pid in scratch.pids(finished_project))
    assert (finished_project / "cleaned").exists() is not ignores_signals
    assert (
        (finished_project / "second.txt").read_text()
        == (finished_project / "more.txt").read_text()
        == "input firstsecond"
    )
    assert lines[-1] == "stage 'second' was interrupted. The results of its last successful run are restored."
    # No lock blocks the next run.
    (finished_project / "behaviour").unlink()
    assert dvc.reproduce("second", Paths(finished_project), print) == "ran"
