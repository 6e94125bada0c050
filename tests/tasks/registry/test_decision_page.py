"""The gate's decision as a page, in a real browser: reached from the report, offline, on a narrow screen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry_project import Project, files_of, make_project
from report_page import make_report

from tasks.config.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_report_leads_to_the_decision(
    project: Project, browser: Any, tmp_path_factory: pytest.TempPathFactory, colours: str
) -> None:
    project.promote(project.register(0, worst=0.5))
    version = project.register(1, worst=0.3)
    verdict = project.judge(version)
    _, _, report_paths = make_report(tmp_path_factory.mktemp("report"))
    (report_paths.reports / "decision.html").write_bytes(project.paths.decision_page.read_bytes())
    troubles: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=colours)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url[:80]))
    page.goto(report_paths.report.as_uri())

    page.get_by_role("link", name="last decision").click()

    assert page.title().startswith("digits version 2: the gate")
    rows = page.locator("#rules tbody tr")
    assert rows.count() == len(verdict.rules)
    for row, rule in zip(rows.all(), verdict.rules, strict=True):
        text = row.inner_text()
        assert rule.name in text
        assert rule.verdict in text
        assert rule.reason in " ".join(text.split())
        assert (row.locator("svg").count() == 1) == (rule.interval is not None)
    compared = page.locator("tr", has_text="robust_accuracy").filter(has=page.locator("svg")).first
    compared.locator("summary").click()
    assert "only champion" in compared.locator("dl").inner_text()
    assert project.version(version).tags["weights_sha256"] in page.locator("#identity").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
    assert troubles == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


def test_the_page_lies_beside_the_report_in_mlflow(project: Project) -> None:
    version = project.register()
    project.judge(version)
    run_id = str(project.version(version).run_id)
    (evaluation,) = files_of(run_id, "evaluations")
    assert {f"{evaluation}/report.html", f"{evaluation}/decision.html"} <= files_of(run_id, evaluation)
    first = project.paths.decision_page.read_bytes()
    project.judge(version)
    assert project.paths.decision_page.read_bytes() == first
    assert b"There was no champion to compare with." in first
