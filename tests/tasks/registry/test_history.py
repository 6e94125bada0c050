"""Every move of @champion is in the history once, whoever made it and whenever the process was killed."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from project import ROOT
from registry_project import NAME, Project, make_project

from tasks.config.settings import Settings
from tasks.registry import history, moves, status

pytestmark = pytest.mark.slow

# Runs promote or rollback and kills itself before or after the alias moves: {1: settings, 2: what, 3: when}.
KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from tasks.config.paths import Paths
from tasks.registry import moves

set_alias = MlflowClient.set_registered_model_alias

def set_alias_and_die(*arguments):
    if sys.argv[3] == "after":
        set_alias(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

MlflowClient.set_registered_model_alias = set_alias_and_die
settings = pickle.loads(Path(sys.argv[1]).read_bytes())
if sys.argv[2] == "promote":
    moves.promote(settings, Paths(), 2, who="killed", command="promote", reason="r", force=True)
else:
    moves.rollback(settings, Paths(), who="killed", reason="r")
"""


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def run_killed(project: Project, command: str, when: str) -> None:
    settings = project.paths.root / "settings.pickle"
    settings.write_bytes(pickle.dumps(project.settings))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", KILLED, settings, command, when], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL


def test_an_entry_says_who_when_why_and_on_which_evidence(project: Project) -> None:
    version = project.register()
    verdict = project.judge(version)
    project.promote(version, force=False)
    (entry,) = status.read_history(project.settings, project.paths)
    assert entry.outcome == history.COMPLETED
    move = entry.move
    assert (move.alias, move.from_version, move.to_version) == ("champion", None, 1)
    assert (move.who, move.command, move.reason, move.forced) == ("tester@host", "promote", "test", False)
    assert move.evidence == f"gate passed. {' '.join(verdict.reasons)}"
    assert move.run_id == project.version(version).run_id
    assert move.time.endswith("+00:00")
    assert move.previous is None


def test_entries_are_added_and_never_changed(project: Project) -> None:
    first, second = project.register(0), project.register(1)
    before: dict[str, str] = {}
    for version in (first, second, first, second):
        project.promote(version)
        tags = dict(mlflow.MlflowClient().get_registered_model(NAME).tags)
        assert before.items() < tags.items()
        before = tags
    entries = status.read_history(project.settings, project.paths)
    assert project.history() == [(None, 1), (1, 2), (2, 1), (1, 2)]
    assert [entry.move.previous for entry in entries] == [None, *(entry.key for entry in entries[:-1])]


def test_a_move_by_hand_is_recorded_by_the_next_command(project: Project) -> None:
    for seed in range(3):
        project.register(seed)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "champion", "1")  # before the history began
    project.promote(2)
    client.set_registered_model_alias(NAME, "champion", "3")
    assert project.rollback().champion == 2
    assert project.history() == [(None, 1), (1, 2), (2, 3), (3, 2)]
    commands = [entry.move.command for entry in status.read_history(project.settings, project.paths)]
    assert commands == ["outside d2r", "promote", "outside d2r", "rollback"]


def test_moves_of_the_challenger_are_recorded_and_change_nothing_for_the_champion(project: Project) -> None:
    project.promote(project.register(0))
    project.register(1)
    project.register(1)  # it is @challenger already
    mlflow.MlflowClient().set_registered_model_alias(NAME, "challenger", "1")  # by hand
    project.promote(project.register(2))

    entries = status.read_history(project.settings, project.paths, alias="challenger")

    assert [(entry.move.from_version, entry.move.to_version) for entry in entries] == [
        (None, 1),
        (1, 2),
        (2, 1),
        (1, 3),
    ]
    assert [entry.move.command for entry in entries] == ["register", "register", "outside d2r", "register"]
    assert {entry.outcome for entry in entries} == {history.COMPLETED}
    assert entries[0].move.who == history.local_user()
    assert project.history() == [(None, 1), (1, 3)]
    assert history.champions(status.read_history(project.settings, project.paths, alias=None)) == [1, 3]
    assert project.rollback().champion == 1
    # The keys tell the order of all moves.
    everything = status.read_history(project.settings, project.paths, alias=None)
    assert [entry.move.alias[:5] for entry in everything] == [
        "chall",
        "champ",
        "chall",
        "chall",
        "chall",
        "champ",
        "champ",
    ]


def test_a_killed_registration_is_completed(project: Project) -> None:
    project.register(0)
    intent = history.Move(
        to_version=2, from_version=1, who="killed", command="register", reason="r", alias="challenger"
    )
    project.register(1)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "challenger", "1")
    history.repair(client, NAME)
    history._append(client, NAME, intent)

    assert project.register(1) == 2

    assert project.challenger() == 2
    last = status.read_history(project.settings, project.paths, alias="challenger")[-1]
    assert (last.move.who, last.outcome) == ("killed", "completed")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_move_is_completed_by_the_next_command(project: Project, when: str) -> None:
    project.promote(project.register(0))
    project.register(1)
    run_killed(project, "promote", when)
    assert project.champion() == (2 if when == "after" else 1)
    assert [entry.outcome for entry in status.read_history(project.settings, project.paths)] == ["completed", None]
    assert not project.promote(2)  # completed, and not once more
    assert project.champion() == 2

    run_killed(project, "rollback", when)
    assert project.rollback() == moves.Rollback(left=2, champion=1)  # and not further back
    assert "hold" in project.version(2).tags
    assert project.history() == [(None, 1), (1, 2), (2, 1)]
    entries = status.read_history(project.settings, project.paths)
    assert [(entry.outcome, entry.move.who) for entry in entries[1:]] == [("completed", "killed")] * 2


def test_an_intent_whose_version_is_gone_does_not_block(project: Project) -> None:
    project.promote(project.register(0))
    project.register(1)
    client = mlflow.MlflowClient()
    intent = history.Move(to_version=7, from_version=1, who="killed", command="promote", reason="r")
    history._append(client, NAME, intent)
    assert project.promote(2)
    entries = status.read_history(project.settings, project.paths)
    assert [entry.outcome for entry in entries] == ["completed", "abandoned", "completed"]
    assert project.rollback().champion == 1
