"""`d2r` as a person meets it: help, stages, presets, status, errors, Ctrl-C."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import robustness_json
import scratch_project as scratch
from typer.testing import CliRunner

from flows import cli
from tasks.pipeline import dvc
from tasks.registry import status
from tasks.registry.status import RegistryStatus

COMMANDS = ("run", "stage", "evaluate", "use", "status")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch.make_done(tmp_path_factory.mktemp("done"))


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    """A project that has run, with the real presets; `second` is to be run again."""
    shutil.copytree(scratch.ROOT / "presets", tmp_path / "project/presets")
    return shutil.copytree(template, tmp_path / "project", dirs_exist_ok=True)


def d2r(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(scratch.d2r(*arguments), cwd=cwd, env=scratch.environment(), capture_output=True, text=True)


def failure(*arguments: str, cwd: Path) -> str:
    """The message of a command that must fail with exit code 1 and say it once, on stderr."""
    ended = d2r(*arguments, cwd=cwd)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stdout + ended.stderr
    return ended.stderr


def test_help_shows_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    command = (
        "import atexit, sys; from flows.cli import main; "
        "heavy = {'torch', 'mlflow', 'prefect', 'dvc', 'pandas', 'pydantic', 'numpy', 'rich'}; "
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)))); "
        "sys.argv = ['d2r', '--help']; main()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=scratch.environment(), capture_output=True, text=True
    )

    assert shown.returncode == 0
    assert all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert "..." not in shown.stdout.partition("Commands:")[2], "a command's help is cut off"
    assert "heavy: []" in shown.stdout


def test_a_stage_runs_and_is_then_up_to_date(project: Path) -> None:
    first = d2r("stage", "second", cwd=project)
    again = d2r("stage", "second", cwd=project)

    assert first.returncode == again.returncode == 0
    assert "second: one\nsecond: two\nsecond: a warning\nsecond: three\nstage second: ran\n" in first.stdout
    assert again.stdout.endswith("stage second: up to date\n")


def test_a_failed_stage_is_one_message(project: Path) -> None:
    (project / "behaviour").write_text("second fail")

    message = failure("stage", "second", cwd=project)

    assert message == (
        "error: stage 'second' failed: the loss is NaN in step 7\nlower train.learning_rate\n"
        "Its last good results are back in place.\n"
    )


def test_a_terminal_shows_progress_and_the_message_is_complete_all_the_same(project: Path) -> None:
    (project / "behaviour").write_text("first")
    ours, theirs = pty.openpty()
    good = subprocess.run(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment(), stderr=theirs)
    (project / "behaviour").write_text("second fail")
    (project / "first.txt").write_text("changed")
    bad = subprocess.run(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment(), stderr=theirs)
    os.close(theirs)
    screen = b""
    while chunk := _read(ours):
        screen += chunk
    os.close(ours)

    assert (good.returncode, bad.returncode) == (0, 1)
    assert b"\r0/2\r1/2\r2/2" in screen
    assert b"error: stage 'second' failed: the loss is NaN in step 7\r\nlower train.learning_rate" in screen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody writes to it any more
        return b""


def test_unknown_names_suggest_the_close_one(project: Path) -> None:
    assert "Did you mean 'second'? The stages are: first, second." in failure("stage", "secnd", cwd=project)
    assert "Did you mean 'digits'? The presets are: " in failure("use", "digit", cwd=project)


@pytest.mark.parametrize("arguments", [("run",), ("stage", "train"), ("use", "digits"), ("status",)])
def test_outside_a_project_it_says_so(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "run this in the project's own folder" in failure(*arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mistyped_parameter_changes_nothing_on_disk(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("clean_weight:", "clean_wait:"))
    before = scratch.tree(project)

    for arguments in (("run",), ("stage", "second"), ("status",)):
        assert "Did you mean 'clean_weight'?" in failure(*arguments, cwd=project)

    assert scratch.tree(project) == before


def test_a_preset_replaces_a_preset_but_not_what_a_person_wrote(project: Path) -> None:
    params, presets = project / "params.yaml", project / "presets"

    assert d2r("use", "cifar10_cpu", cwd=project).returncode == 0
    assert params.read_bytes() == (presets / "cifar10_cpu.yaml").read_bytes()
    params.unlink()
    assert d2r("use", "digits", cwd=project).returncode == 0
    assert params.read_bytes() == (presets / "digits.yaml").read_bytes()

    own = params.read_text() + "# mine\n"
    params.write_text(own)
    assert "--force" in failure("use", "cifar10_cpu", cwd=project)
    assert params.read_text() == own
    assert d2r("use", "cifar10_cpu", "--force", cwd=project).returncode == 0
    assert params.read_bytes() == (presets / "cifar10_cpu.yaml").read_bytes()


def test_a_broken_preset_is_not_put_in_place(project: Path) -> None:
    (project / "presets/broken.yaml").write_text("seed: 0\n")
    before = scratch.tree(project)

    assert "broken.yaml: " in failure("use", "broken", cwd=project)
    assert scratch.tree(project) == before


def test_params_yaml_is_the_preset_of_the_digits() -> None:
    assert (scratch.ROOT / "params.yaml").read_bytes() == (scratch.ROOT / "presets/digits.yaml").read_bytes()


def test_status_before_anything_has_run(tmp_path: Path) -> None:
    project = scratch.make(tmp_path)
    before = scratch.tree(project)

    said = d2r("status", cwd=project)

    assert said.returncode == 0
    assert said.stdout.splitlines()[:5] == [
        "first       has not run",
        "second      has not run",
        "",
        "champion    none yet",
        "challenger  none yet",
    ]
    assert "report      not made yet" in said.stdout
    assert scratch.tree(project) == before


def test_status_says_what_changed_and_what_waits_for_it(project: Path) -> None:
    (project / "input.txt").write_text("third ")
    d2r("stage", "second", cwd=project)

    said = d2r("status", cwd=project).stdout.splitlines()

    assert said[:2] == ["first       to be run: input.txt modified", "second      waits for first"]


def test_status_says_that_a_run_is_in_progress(project: Path) -> None:
    (project / "behaviour").write_text("second sleep")
    running = subprocess.Popen(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment())
    scratch.pids(project)

    said = d2r("status", cwd=project)

    assert said.returncode == 0
    assert said.stdout.startswith("A run is in progress.\n")
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_stage_leaves_nothing_behind(project: Path, sent: signal.Signals) -> None:
    (project / "behaviour").write_text("second sleep")
    before = scratch.tree(project)
    running = subprocess.Popen(
        scratch.d2r("stage", "second"), cwd=project, env=scratch.environment(), stderr=subprocess.PIPE, text=True
    )
    pids = scratch.pids(project)

    running.send_signal(sent)
    _, said = running.communicate()

    assert running.returncode == 130
    assert said == "interrupted\n"
    assert not any(scratch.alive(pid) for pid in pids)
    for made in ("pids", "cleaned"):
        (project / made).unlink()
    assert scratch.tree(project) == before


def test_ctrl_c_ends_the_whole_flow_at_once(project: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to its whole process group. No server is configured: the flow has one of its own."""
    (project / "behaviour").write_text("second sleep")
    log = tmp_path / "log"
    with log.open("w") as stream:
        running = subprocess.Popen(
            scratch.d2r("run"),
            cwd=project,
            env=scratch.environment() | {"PREFECT_HOME": str(tmp_path / "prefect")},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pids = scratch.pids(project)

        os.killpg(running.pid, signal.SIGINT)
        start = time.monotonic()
        assert running.wait() == 130

    assert time.monotonic() - start < 60
    assert not any(scratch.alive(pid) for pid in pids)
    assert (project / "second.txt").read_text() == "input firstsecond"
    said = log.read_text()
    assert "Its last good results are back in place." in said
    assert "Finished in state Crashed" in said, "the flow could not tell its server how it ended"
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("aliases", "settled", "up_to_date"),
    [(("challenger", "champion"), False, True), (("challenger",), True, True), (("challenger",), False, False)],
)
def test_a_second_run_starts_no_flow(
    project: Path,
    robustness: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    aliases: tuple[str, ...],
    settled: bool,
    up_to_date: bool,
) -> None:
    robustness(project)
    monkeypatch.chdir(project)
    monkeypatch.setattr(dvc, "status", lambda paths: {})
    registered = RegistryStatus(3, aliases, "failed", ("Too weak.",), settled, "1", "run")
    monkeypatch.setattr(status, "registry_status", lambda settings, paths: registered)
    flows: list[bool] = []
    monkeypatch.setattr(cli, "_retrain", lambda: flows.append(True))

    said = CliRunner().invoke(cli.app, ["run"])

    assert said.exit_code == 0, said.output
    assert flows == ([] if up_to_date else [True])
    assert said.output.startswith("Everything is up to date.") is up_to_date
    for expected in (
        *("Accuracy under attack (L2)", "PGD-20", "10 of 40", "12.5% [5.0, 25.0]", "version 3 @challenger"),
        "self-checks failed: A large eps fools every image; skipped: Square",
        *("Too weak.", "mlflow ui --backend-store"),
    ):
        assert expected in said.output


@pytest.fixture
def robustness() -> Callable[[Path], None]:
    """Writes a small `reports/robustness.json` into a project."""

    def write(project: Path) -> None:
        attacks = {"clean": ("clean", 40), "pgd": ("PGD-20", 40), "autoattack": ("AutoAttack", 10)}
        figures = {
            key: robustness_json.figures(name, 0.125, images, interval=[0.05, 0.25])
            for key, (name, images) in attacks.items()
        }
        results = {"More steps are never weaker": True, "A large eps fools every image": False, "Square": None}
        checks = tuple({"key": name, "name": name, "passed": passed, "found": ""} for name, passed in results.items())
        models = {name: robustness_json.model(name, figures, checks) for name in ("guidance", "target")}
        robustness_json.write(project / "reports/robustness.json", robustness_json.content(models, norm="L2"))

    return write
