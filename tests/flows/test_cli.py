"""`d2r` on the command line: help, stages, presets, status, error messages."""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import robustness_json
import scratch_project as scratch
from project import ROOT
from typer.testing import CliRunner

from flows import cli, pipeline_commands
from tasks.pipeline import dvc
from tasks.registry import status
from tasks.registry.decision import Decision, Rule
from tasks.registry.status import RegistryStatus

COMMANDS = (
    *("run", "stage", "evaluate", "predict", "use", "status"),
    *("approve", "promote", "rollback", "release", "models", "history", "compare", "lineage", "reproduce", "gc"),
)


@pytest.fixture
def project(finished_project: Path) -> Path:
    """A finished scratch project, with the real presets."""
    shutil.copytree(ROOT / "presets", finished_project / "presets")
    return finished_project


def d2r(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(scratch.d2r(*arguments), cwd=cwd, env=scratch.environment(), capture_output=True, text=True)


def failure(*arguments: str, cwd: Path) -> str:
    """The message on stderr of a command that must fail with exit code 1."""
    process = d2r(*arguments, cwd=cwd)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stdout + process.stderr
    return process.stderr


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    process = d2r("--version", cwd=tmp_path)

    assert (process.returncode, process.stdout) == (0, f"d2r {metadata.version('d2r')}\n")


def test_help_shows_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    command = (
        "import atexit, sys; from flows.cli import main; "
        "heavy = {'torch', 'mlflow', 'prefect', 'dvc', 'pandas', 'pydantic', 'numpy', 'rich'}; "
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)))); "
        "sys.argv = ['d2r', '--help']; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=scratch.environment(), capture_output=True, text=True
    )

    assert process.returncode == 0
    assert all(f"\n  {name} " in process.stdout for name in COMMANDS)
    assert "..." not in process.stdout.partition("Commands:")[2], "a command's help is cut off"
    assert "heavy: []" in process.stdout


def test_a_stage_runs_and_is_then_up_to_date(project: Path) -> None:
    first = d2r("stage", "second", cwd=project)
    again = d2r("stage", "second", cwd=project)

    assert first.returncode == again.returncode == 0
    assert "second: one\nsecond: two\nsecond: a warning\nsecond: three\nstage second: ran\n" in first.stdout
    assert again.stdout.endswith("stage second: up to date\n")


def test_a_stage_after_one_that_is_not_up_to_date_says_so(project: Path) -> None:
    assert "It used" not in d2r("stage", "second", cwd=project).stdout
    (project / "input.txt").write_text("changed ")
    output = d2r("stage", "second", cwd=project).stdout
    assert "stage second: up to date" in output
    assert "It used earlier results of first, not up to date with the present files and params.yaml" in output


def test_a_failed_stage_is_one_message(project: Path) -> None:
    (project / "behaviour").write_text("second fail")

    message = failure("stage", "second", cwd=project)

    assert message == (
        "error: stage 'second' failed: the loss is NaN in step 7\nlower train.learning_rate\n"
        "The results of its last successful run are restored.\n"
    )


@pytest.mark.slow
def test_a_terminal_shows_progress_bars_and_the_complete_message(project: Path) -> None:
    (project / "behaviour").write_text("first")
    master, slave = pty.openpty()
    good = subprocess.run(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment(), stderr=slave)
    (project / "behaviour").write_text("second fail")
    (project / "first.txt").write_text("changed")
    bad = subprocess.run(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment(), stderr=slave)
    os.close(slave)
    screen = b""
    while chunk := _read(master):
        screen += chunk
    os.close(master)

    assert (good.returncode, bad.returncode) == (0, 1)
    assert b"\r0/2\r1/2\r2/2" in screen
    assert b"error: stage 'second' failed: the loss is NaN in step 7\r\nlower train.learning_rate" in screen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the terminal has no writer left
        return b""


def test_an_unknown_name_suggests_a_similar_one(project: Path) -> None:
    assert "Did you mean 'second'? The stages are: first, second." in failure("stage", "secnd", cwd=project)
    assert "Did you mean 'digits'? The presets are: " in failure("use", "digit", cwd=project)


@pytest.mark.parametrize("arguments", [("run",), ("stage", "train"), ("use", "digits"), ("status",)])
def test_a_command_outside_of_a_project_is_an_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "run this in the project's own folder" in failure(*arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistyped_parameter_changes_nothing_on_disk(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("clean_weight:", "clean_wait:"))
    before = scratch.tree(project)

    for arguments in (("run",), ("stage", "second"), ("status",)):
        assert "Did you mean 'clean_weight'?" in failure(*arguments, cwd=project)

    assert scratch.tree(project) == before


def test_a_preset_replaces_a_preset_but_not_changes_of_the_user(project: Path) -> None:
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


def test_params_yaml_is_the_digits_preset() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets/digits.yaml").read_bytes()


@pytest.mark.slow
def test_status_before_anything_has_run(tmp_path: Path) -> None:
    project = scratch.make(tmp_path)
    before = scratch.tree(project)

    process = d2r("status", cwd=project)

    assert process.returncode == 0
    assert process.stdout.splitlines()[:5] == [
        "first       has not run",
        "second      has not run",
        "",
        "champion    none yet",
        "challenger  none yet",
    ]
    assert "report      not written yet" in process.stdout
    assert scratch.tree(project) == before


@pytest.mark.slow
def test_status_shows_what_changed_and_what_waits_for_it(project: Path) -> None:
    (project / "input.txt").write_text("third ")
    d2r("stage", "second", cwd=project)

    lines = d2r("status", cwd=project).stdout.splitlines()

    assert lines[:2] == ["first       outdated: input.txt modified", "second      waits for first"]


@pytest.mark.slow
def test_status_shows_every_rule_of_the_gate(project: Path) -> None:
    rules = (
        Rule(
            name="clean_accuracy", verdict="passed", reason="Clean accuracy 95.00% is enough.", figures={"accuracy": 1}
        ),
        Rule(name="robust_accuracy", verdict="failed", reason="Between -3.00% and +1.00%.", interval=(-0.03, 0.01)),
        Rule(name="autoattack", verdict="undecided", reason="Too few images."),
    )
    Decision(
        model_name="digits",
        version=4,
        passed=False,
        weights_sha256="w",
        data_hash="d",
        evaluation_hash="e",
        champion=3,
        champion_predictions="recorded",
        confidence=0.95,
        margin=0.02,
        rules=rules,
    ).write(project / "reports/decision.json")

    output = d2r("status", cwd=project).stdout

    listed = "".join(f"{'':<12}{rule.verdict:<10} {rule.name}: {rule.reason}\n" for rule in rules)
    assert f"gate        version 4 failed\n{listed}" in output


@pytest.mark.slow
def test_status_during_a_run(project: Path) -> None:
    (project / "behaviour").write_text("second sleep")
    running = subprocess.Popen(scratch.d2r("stage", "second"), cwd=project, env=scratch.environment())
    scratch.pids(project)

    process = d2r("status", cwd=project)

    assert process.returncode == 0
    assert process.stdout.startswith("A run is in progress.\n")
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130


@pytest.mark.parametrize(
    ("aliases", "settled", "up_to_date"),
    [(("challenger", "champion"), False, True), (("challenger",), True, True), (("challenger",), False, False)],
)
def test_a_second_run_does_not_start_the_flow(
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
    monkeypatch.setattr(pipeline_commands, "_run_flow", lambda: flows.append(True))

    result = CliRunner().invoke(cli.app, ["run"])

    assert result.exit_code == 0, result.output
    assert flows == ([] if up_to_date else [True])
    assert result.output.startswith("Everything is up to date.") is up_to_date
    for expected in (
        *("Accuracy under attack (L2)", "PGD-20", "10 of 40", "12.5% [5.0, 25.0]", "version 3 @challenger"),
        "self-checks failed: A large eps fools every image; skipped: Square",
        *("Too weak.", "mlflow ui --backend-store"),
    ):
        assert expected in result.output


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
