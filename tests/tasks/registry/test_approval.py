"""What may be approved, and what an approval and a rejection bind."""

from collections.abc import Callable
from pathlib import Path

import pytest
from registry_project import Project, make_project

from d2r_core.errors import UserError
from tasks.config.settings import Settings
from tasks.registry import approval, moves

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def approve(project: Project, version: int) -> bool:
    return approval.approve(project.settings, project.paths, version, who="Ada", reason="Better.")


def test_only_a_version_that_passed_the_gate_is_approved(project: Project) -> None:
    version = project.register(worst=0.0)
    with pytest.raises(moves.RefusedError, match="version 1 has not been judged by the gate"):
        approve(project, version)
    assert not project.judge(version).passed
    with pytest.raises(moves.RefusedError, match="version 1 did not pass the gate"):
        approve(project, version)
    with pytest.raises(moves.RefusedError, match="version 1 did not pass the gate"):
        approval.request(project.settings, project.paths, version, who="Ada")
    with pytest.raises(UserError, match="digits has no version 7"):
        approve(project, 7)
    assert project.champion() is None
    assert "approval" not in project.version(version).tags


def test_a_version_on_hold_is_not_approved(project: Project) -> None:
    first, second = project.register(0, worst=0.5), project.register(1, worst=0.9)
    project.promote(first)
    assert project.judge(second).passed
    assert approve(project, second)
    project.rollback()
    with pytest.raises(moves.RefusedError, match="version 2 is on hold"):
        approve(project, second)
    assert project.champion() == first


def test_the_gate_judges_again_if_the_champion_has_changed(project: Project) -> None:
    project.promote(project.register(0, worst=0.4))
    second = project.register(1, worst=0.8)
    assert project.judge(second).passed  # better than version 1
    project.promote(project.register(2, worst=0.8))

    with pytest.raises(moves.RefusedError, match=r"version 2 did not pass the gate: Robust accuracy 80\.00%, the ch"):
        approve(project, second)  # as good as version 3, no better

    assert project.champion() == 3


def test_a_rejection_binds_until_an_approval(project: Project) -> None:
    version = project.register()
    assert project.judge(version).passed
    approval.request(project.settings, project.paths, version, who="flow")
    approval.reject(project.settings, project.paths, version, who="Ada", reason="No.")
    # Neither is anybody asked again, nor does a run promote it once approval is automatic.
    again = approval.request(project.settings, project.paths, version, who="flow")
    assert again is not None
    assert (again.state, again.who, again.reason) == ("rejected", "Ada", "No.")
    assert approval.expire(project.settings, project.paths, version) == again
    with pytest.raises(moves.RefusedError, match=r"^Rejected by Ada at 20.*: No. `d2r approve 1 --reason TEXT`"):
        project.promote(version, force=False)
    assert approve(project, version)
    assert not approve(project, version)
    assert len(project.history()) == 1
    with pytest.raises(UserError, match="--reason needs a sentence"):
        approval.reject(project.settings, project.paths, version, who="Ada", reason=" ")
