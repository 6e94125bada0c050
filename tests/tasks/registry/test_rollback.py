"""A rollback holds: what it leaves is on hold, and no automatic run promotes it again until it is released."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scratch_project as scratch
import yaml
from registry_project import Project, make_project
from typer.testing import CliRunner

from d2r_core.errors import UserError
from flows import promotion
from flows.cli import app
from tasks.config.settings import Settings
from tasks.registry import moves, status, versions

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    for name in ("register", "gate", "promote"):  # the tasks' functions themselves: no server, no retries
        monkeypatch.setattr(promotion, name, getattr(promotion, name).fn)
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def retrain(project: Project, seed: int, worst: float) -> promotion.PromotionResult:
    """An automatic run that ended with that seed's weights."""
    project.train(seed)
    project.evaluate(worst=worst)
    return promotion.promotion(project.settings, project.paths)


def release(project: Project, version: int) -> bool:
    return moves.release(project.settings, project.paths, version, who="tester@host")


def test_the_next_run_does_not_undo_a_rollback(project: Project) -> None:
    retrain(project, seed=0, worst=0.5)
    assert retrain(project, seed=1, worst=0.9).alias == "champion"
    assert project.rollback() == moves.Rollback(left=2, champion=1)

    result = retrain(project, seed=1, worst=0.9)

    assert (result.version, result.alias, result.verdict.passed) == (2, "challenger", False)
    (reason,) = result.verdict.reasons
    assert reason.startswith("digits version 2 is on hold since 20")
    assert "by tester@host: It fails in production. `d2r release 2` lets automatic runs promote it" in reason
    assert project.champion() == 1
    # Nor does it as another version: the same weights, evaluated with other settings.
    project.with_settings(evaluate={"eps": 0.2})
    assert "on hold with version 2, of the same weights" in retrain(project, seed=1, worst=0.9).verdict.reasons[0]

    assert release(project, 3)
    assert not release(project, 3)
    assert retrain(project, seed=1, worst=0.9).alias == "champion"


def test_rollback_goes_back_step_by_step(project: Project) -> None:
    promoted = [project.register(seed) for seed in range(3)]
    for version in promoted:
        assert project.promote(version)
        assert not project.promote(version)
    assert project.rollback().champion == promoted[1]
    assert project.rollback().champion == promoted[0]
    with pytest.raises(UserError, match="version 1 is the first champion in the history that is not on hold"):
        project.rollback()
    assert project.history() == [(None, 1), (1, 2), (2, 3), (3, 2), (2, 1)]


def test_rollback_to_a_version(project: Project) -> None:
    for seed in range(3):
        project.promote(project.register(seed))
    assert project.rollback(to=1) == moves.Rollback(left=3, champion=1)
    assert project.rollback(to=1) == moves.Rollback(left=None, champion=1)  # nothing to do, nothing recorded
    with pytest.raises(UserError, match="version 3 is on hold"):
        project.rollback(to=3)
    with pytest.raises(UserError, match="digits has no version 9"):
        project.rollback(to=9)
    assert len(project.history()) == 4


def test_without_champion_there_is_nothing_to_roll_back(project: Project) -> None:
    with pytest.raises(UserError, match="digits has no champion"):
        project.rollback()


def test_only_a_forced_promotion_takes_a_refused_version(project: Project) -> None:
    first, second = project.register(0), project.register(1, worst=0.5)
    with pytest.raises(moves.RefusedError, match="version 1 has not been judged by the gate"):
        project.promote(first, force=False)
    assert project.judge(first).passed
    assert project.promote(first, force=False)
    assert not project.judge(second).passed
    with pytest.raises(moves.RefusedError, match=r"version 2 did not pass the gate: Robust accuracy 50\.00%, the"):
        project.promote(second, force=False)
    assert project.promote(second, force=True)
    project.rollback()
    assert project.promote(second, force=True)  # which ends the hold
    assert "hold" not in project.version(second).tags
    entries = status.read_history(project.settings, project.paths)
    assert [entry.move.forced for entry in entries] == [False, True, False, True]


def test_commands(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    settings = project.settings
    monkeypatch.setattr("tasks.config.settings.load", lambda path: settings)

    def d2r(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        return result.output if result.exit_code == 0 else f"{result.exit_code} {result.exception}"

    assert "There are no versions yet" in d2r("models")
    assert "No alias has moved yet" in d2r("history")
    for seed in range(2):
        project.judge(project.register(seed))
    assert d2r("promote", "1", "--reason", "the first") == "digits version 1 is @champion.\n"
    assert d2r("promote", "1", "--reason", "again") == "digits version 1 is @champion already.\n"
    assert d2r("promote", "2", "--reason", "a [new] one") == "digits version 2 is @champion.\n"
    assert "version 1 is @champion again" in d2r("rollback", "--reason", "wrong colours")
    table = [line.split() for line in d2r("models").splitlines() if "%" in line]
    assert [row[1] for row in table] == ["2", "1"]
    assert "wrong colours" in " ".join(table[0])
    assert "@champion" in table[1]
    rows = [line for line in d2r("history").splitlines() if "gate passed" in line]
    assert len(rows) == 3
    assert "rollback" in rows[0]
    assert "a [new] one" in rows[1]
    assert "the first" in rows[2]
    moved = [line.split("│")[2].strip() for line in d2r("history").splitlines() if "│" in line]
    assert list(filter(None, moved)) == ["@champion", "@champion", "@champion", "@challenger", "@challenger"]
    assert d2r("release", "2") == "digits version 2 is released.\n"
    assert d2r("release", "2") == "digits version 2 is not on hold.\n"
    for arguments in (("promote", "7", "--reason", "x"), ("rollback", "--to", "7", "--reason", "x"), ("release", "7")):
        assert d2r(*arguments) == "1 digits has no version 7. `d2r models` lists them."
    assert d2r("promote", "2", "--reason", " ").startswith("1 --reason needs a sentence")
    assert versions.champion(settings, project.paths) == 1


@pytest.mark.parametrize("command", ["models", "history"])
def test_a_list_needs_no_pytorch(project: Project, command: str) -> None:
    project.promote(project.register(0))
    project.paths.params.write_text(yaml.safe_dump(project.settings.model_dump(mode="json", by_alias=True)))
    code = (
        "import atexit, sys; from flows.cli import main; "
        "atexit.register(lambda: print('torch:', 'torch' in sys.modules)); "
        f"sys.argv = ['d2r', '{command}']; main()"
    )
    environment = {**scratch.environment(), "COLUMNS": "300"}

    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert "@champion" in process.stdout
    assert process.stdout.endswith("torch: False\n")


def test_models_shows_a_hold_on_every_version_of_the_weights(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.promote(project.register(0))
    project.promote(project.register(1))
    project.rollback()
    project.with_settings(evaluate={"eps": 0.2})
    assert project.register(1) == 3  # the weights of version 2
    monkeypatch.setenv("COLUMNS", "300")
    settings = project.settings
    monkeypatch.setattr("tasks.config.settings.load", lambda path: settings)

    rows = [line for line in CliRunner().invoke(app, ["models"]).output.splitlines() if "%" in line]

    assert "with version 2: It fails in production." in rows[0]
    assert " It fails in production." in rows[1]
    assert "with version" not in rows[1]
    assert "It fails" not in rows[2]
