"""`tasks.pipeline.dvc` on a real DVC project of small stages: order, output, failure, interruption."""

import os
import shutil
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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch.make_done(tmp_path_factory.mktemp("done"))


@pytest.fixture
def done(template: Path, tmp_path: Path) -> Path:
    """A project whose two stages have run well, and whose `second` has something new to do."""
    return shutil.copytree(template, tmp_path / "done")


@pytest.fixture
def busy(done: Path) -> Iterator[Path]:
    """The same project while `second` runs in another process."""
    (done / "behaviour").write_text("second sleep")
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", "second"], cwd=done, start_new_session=True
    )
    scratch.pids(done)
    yield done
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()


def test_the_order_is_that_of_the_graph_and_not_of_the_file(project: Path) -> None:
    assert dvc.order(Paths(project)) == ["first", "second"]


def test_a_folder_without_a_graph_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dvc\.yaml in .* project's own folder"):
        dvc.order(Paths(tmp_path))


def test_a_stage_runs_once_and_is_remembered(project: Path) -> None:
    paths, lines = Paths(project), list[str]()

    assert dvc.reproduce("first", paths, lines.append) == "ran"
    # stdout and stderr in the order in which the stage wrote them, and no advice of DVC's after it.
    expected = ["first: one", "first: two", "first: a warning", "first: three"]
    assert lines == ["Running stage 'first':", "> python stage.py first input.txt first.txt", *expected]

    assert dvc.reproduce("first", paths, print) == "up to date"
    (project / "input.txt").write_text("other ")
    assert dvc.reproduce("first", paths, print) == "ran"
    (project / "input.txt").write_text("input ")
    assert dvc.reproduce("first", paths, print) == "restored"
    assert (project / "first.txt").read_text() == "input first"
    assert set(dvc.status(paths)) == {"second"}


def test_a_failed_stage_says_its_reason_and_loses_nothing(done: Path) -> None:
    (done / "behaviour").write_text("second fail")
    before = scratch.tree(done)

    with pytest.raises(UserError) as failure:
        dvc.reproduce("second", Paths(done), print)

    assert str(failure.value).splitlines() == [
        "stage 'second' failed: the loss is NaN in step 7",
        "lower train.learning_rate",
        "Its last good results are back in place.",
    ]
    assert scratch.tree(done) == before


def test_our_own_defect_is_shown_with_its_traceback(done: Path) -> None:
    (done / "behaviour").write_text("second crash")

    with pytest.raises(UserError, match=r"Traceback[\s\S]*ZeroDivisionError: our own defect"):
        dvc.reproduce("second", Paths(done), print)


def test_what_a_failed_stage_left_complete_is_kept(done: Path) -> None:
    (done / "behaviour").write_text("second document")

    with pytest.raises(UserError, match=r"^stage 'second' failed: no good$"):
        dvc.reproduce("second", Paths(done), print)

    assert (done / "second.txt").read_text() == "what is wrong"


def test_a_mistyped_parameter_changes_nothing(done: Path) -> None:
    params = done / "params.yaml"
    params.write_text(params.read_text().replace("clean_weight:", "clean_wait:"))
    before = scratch.tree(done)

    with pytest.raises(UserError, match=r"train\.method\.clean_wait is not a known key\. Did you mean 'clean_weight'"):
        dvc.reproduce("second", Paths(done), print)

    assert scratch.tree(done) == before


def test_a_missing_data_path_changes_nothing(done: Path) -> None:
    params = done / "params.yaml"
    params.write_text(params.read_text().replace("path: data/raw", "path: data/rwa"))
    before = scratch.tree(done)

    with pytest.raises(UserError, match=r"^params.yaml: prepare.path is 'data/rwa', which does not exist\.$"):
        dvc.reproduce("first", Paths(done), print)

    assert scratch.tree(done) == before


def test_a_stage_before_its_time_says_which_comes_first(project: Path) -> None:
    with pytest.raises(UserError, match=r"needs first\.txt, which stage 'first' makes"):
        dvc.reproduce("second", Paths(project), print)


def test_an_unknown_stage_suggests_a_known_one(project: Path) -> None:
    with pytest.raises(UserError, match=r"no stage 'secnd'\. Did you mean 'second'"):
        dvc.reproduce("secnd", Paths(project), print)


def test_another_process_at_work_is_told_apart_and_left_alone(busy: Path) -> None:
    with pytest.raises(dvc.BusyError, match=r"another DVC process[\s\S]*PID"):
        dvc.reproduce("second", Paths(busy), print)
    with pytest.raises(dvc.BusyError):
        dvc.status(Paths(busy))

    assert (busy / "second.txt").read_text() == "half"
    assert all(scratch.alive(pid) for pid in scratch.pids(busy))


@pytest.mark.parametrize("manners", ["gentle", "stubborn"])
def test_an_interrupted_stage_leaves_no_process_and_no_half_result(
    done: Path, manners: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (done / "behaviour").write_text("second sleep" if manners == "gentle" else "second sleep stubborn")
    monkeypatch.setattr(process, "GRACE", 10.0 if manners == "gentle" else 0.5)
    lines: list[str] = []

    def interrupt() -> None:
        scratch.pids(done)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        dvc.reproduce("second", Paths(done), lines.append)

    assert not any(scratch.alive(pid) for pid in scratch.pids(done))
    assert (done / "cleaned").exists() is (manners == "gentle")
    assert (done / "second.txt").read_text() == (done / "more.txt").read_text() == "input firstsecond"
    assert lines[-1] == "stage 'second' was interrupted. Its last good results are back in place."
    # The next one is not kept out.
    (done / "behaviour").unlink()
    assert dvc.reproduce("second", Paths(done), print) == "ran"
