"""Every rule of the gate's decision is wherever people look: files, page, version, Prefect artifact, `d2r status`."""

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import ArtifactSort
from registry_project import Project, make_project
from typer.testing import CliRunner

from flows.cli import app
from flows.retrain import retrain
from tasks.config.settings import Settings
from tasks.registry.decision import Decision

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    prefect_server: None,
    finished_template: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """A repository whose champion is version 1; version 2 has another model."""
    folder = shutil.copytree(finished_template, tmp_path / "project")
    lock = (folder / "dvc.lock").read_text()
    project = make_project(folder, tmp_path_factory, tiny_settings, monkeypatch)
    settings = project.with_settings(prepare={"path": "input.txt"})
    project.paths.params.write_text(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True)))
    project.paths.dvc_lock.write_text(lock)
    project.promote(project.register(0, worst=0.5))
    return project


def last_artifact() -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_artifacts(sort=ArtifactSort.CREATED_DESC, limit=1)[0].data)


def assert_everywhere(project: Project, version: int) -> Decision:
    """The decision about the version, once each of its rules is in all places."""
    decision = Decision.read(project.paths.decision)
    assert decision.version == version
    assert len(decision.rules) >= 8
    assert Decision.model_validate_json(project.version(version).tags["decision"]) == decision
    page = " ".join(html.unescape(re.sub("<[^>]*>", " ", project.paths.decision_page.read_text())).split())
    artifact = last_artifact()
    status = CliRunner().invoke(app, ["status"]).output
    for rule in decision.rules:
        assert re.search(rf"{rule.name} \W*{rule.verdict} {re.escape(rule.reason)}", page)
        (row,) = [line for line in artifact.splitlines() if f"| {rule.name} | {rule.verdict} |" in line]
        assert rule.reason in row
        for name, figure in rule.figures.items():
            assert f"{name.replace('_', ' ')} {figure:.4g}" in row
        assert (re.search(r"[+-]\d+\.\d\d% to [+-]\d+\.\d\d% \|", row) is not None) == (rule.interval is not None)
        assert f"{rule.verdict:<11}{rule.name}: {rule.reason}\n" in status
    assert "decision    reports/decision.html\n" in status
    return decision


def test_every_rule_is_everywhere(project: Project) -> None:
    project.train(1)
    project.evaluate(worst=0.3)
    retrain()
    assert not assert_everywhere(project, 2).passed
    assert project.champion() == 1


def test_every_rule_is_everywhere_for_a_version_on_hold(project: Project) -> None:
    project.promote(project.register(1, worst=0.95))
    project.rollback()
    retrain()
    assert assert_everywhere(project, 2).passed
    assert "digits version 2 is on hold since" in last_artifact()
    assert project.champion() == 1
