"""`d2r compare`: two versions image by image, on the terminal and as a page in a real browser."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry_project import Project, logged_model_folder, make_project
from typer.testing import CliRunner

from d2r_core.evaluation.statistics import sign_test
from flows.cli import app
from tasks.config.settings import Settings
from tasks.registry import versions

pytestmark = pytest.mark.slow
Compare = Callable[[object, object], str]  # versions to the output


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    monkeypatch.setenv("COLUMNS", "250")
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


@pytest.fixture
def compare(project: Project, monkeypatch: pytest.MonkeyPatch) -> Compare:
    monkeypatch.setattr("tasks.config.settings.load", lambda path: project.settings)

    def compare(a: object, b: object) -> str:
        result = CliRunner().invoke(app, ["compare", str(a), str(b)])
        return result.output if result.exit_code == 0 else f"error: {result.exception}"

    return compare


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the tables by their first cell."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def register_attacked_with(project: Project, seed: int, **figures: Any) -> int:
    """A version whose PGD had other parameters."""
    project.train(seed)
    project.evaluate(worst=0.8)
    content = json.loads(project.paths.robustness.read_text())
    content["models"]["target"]["attacks"]["pgd"].update(figures)
    project.paths.robustness.write_text(json.dumps(content))
    return versions.register(project.settings, project.paths)


def test_the_table_has_the_paired_figures(project: Project, compare: Compare) -> None:
    project.register(0, clean=0.95, worst=0.5, autoattack=0.4)
    project.with_settings(train={"epochs": 7})
    project.register(1, clean=0.9, worst=0.8, autoattack=0.4)

    output = compare(1, 2)

    table = rows(output)
    # Images 10 to 15 under the worst attack: correct in version 2 alone.
    worst = table["worst"]
    assert [worst[i] for i in (0, 1, 2, 4, 5)] == ["20", "50.00%", "80.00%", "0", "6"]
    assert worst[3].startswith("-30.00% [-")
    low, high = (float(bound) for bound in re.findall(r"([+-][\d.]+)%", worst[3])[1:])
    assert low < -30 < high < 0
    assert float(worst[6]) == pytest.approx(2 * sign_test(6, 0), rel=0.05)
    assert [table["clean"][i] for i in (0, 4, 5, 6)] == ["20", "1", "0", "1"]
    assert [table["AutoAttack standard"][i] for i in (0, 4, 5, 6)] == ["10", "0", "0", "1"]
    # Images 0 and 10 are zeros, 9 and 19 nines: under the worst attack, image 10 alone changes sides.
    assert [table["digit 0"][i] for i in (0, 1, 2, 4, 5, 6)] == ["2", "50.00%", "100.00%", "0", "1", "1"]
    assert [table["digit 9"][i] for i in (0, 1, 2, 4, 5, 6)] == ["2", "50.00%", "50.00%", "0", "0", "1"]
    assert table["train.epochs"] == ["1", "7"]
    assert table["weights_sha256"] == [project.version(number).tags["weights_sha256"] for number in (1, 2)]
    assert "evaluation.settings_hash" not in table
    assert output.splitlines()[-1] == "page  reports/compare-1-2.html"
    project.promote(1)
    assert compare("champion", "@challenger") == output
    assert compare("champion", 1) == "error: Name two different versions; `d2r models` lists them."
    assert compare(1, "staging") == "error: digits has no version @staging. `d2r models` lists them."


def test_what_cannot_be_compared_is_named_or_refused(project: Project, compare: Compare) -> None:
    project.register(0, worst=0.5)
    project.with_settings(evaluate={"steps": 3})
    register_attacked_with(project, seed=1, eps=0.2, steps=3)
    project.prepare(seed=1)
    project.register(2)

    output = compare(1, 2)
    table = rows(output)
    assert "clean" in table
    assert "worst" not in table
    assert not [name for name in table if name.startswith("pgd")]
    assert "not compared: pgd: eps, steps differ." in output
    assert "not compared: The worst attack: not all attacks of which it is the worst are the same." in output
    assert "evaluation.settings_hash" in table

    assert re.match(r"error: Versions 1 and 3 were measured on different data \(\w{12} and \w{12}\)", compare(1, 3))
    assert compare(2, 2) == "error: Name two different versions; `d2r models` lists them."
    assert compare(1, 9) == "error: digits has no version 9. `d2r models` lists them."
    recorded = logged_model_folder(project.version(1)) / "data/model/examples.parquet"
    recorded.write_bytes(recorded.read_bytes() + b"x")
    assert "examples.parquet" in compare(1, 2)
    assert compare(1, 2).startswith("error: ")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_in_a_browser(project: Project, compare: Compare, browser: Any, colours: str) -> None:
    project.register(0, worst=0.5)
    project.register(1, worst=0.8)
    compare(2, 1)
    first = (project.paths.reports / "compare-2-1.html").read_bytes()
    compare(2, 1)
    assert (project.paths.reports / "compare-2-1.html").read_bytes() == first
    troubles: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=colours, java_script_enabled=False)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("request", lambda request: troubles.extend([] if request.url.startswith("file:") else [request.url]))
    page.goto((project.paths.reports / "compare-2-1.html").as_uri())

    assert "version 2 beside version 1" in page.title()
    worst = page.locator("#attacks tbody tr").last
    assert "80.0%" in worst.inner_text()
    assert page.locator("#classes tbody tr").count() == 10
    assert "100.0%" in page.locator("#classes tbody tr").first.inner_text()
    changed = page.locator("#images details[open] tbody tr")
    # The test images are of the classes 0 to 9, twice; images 10 to 15 changed sides.
    assert changed.all_inner_texts() == [f"digit {label}\t{10 + label}\t—" for label in range(6)]
    summary = page.locator("#images details:not([open])").first.locator("summary").inner_text()
    closed = page.locator("#images details").filter(has_text=summary)
    assert not closed.locator("p").is_visible()
    closed.locator("summary").click()
    assert closed.locator("p").inner_text() == "The two agree on every image."
    assert page.locator("#differences tbody tr", has_text="weights_sha256").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
    assert troubles == []
