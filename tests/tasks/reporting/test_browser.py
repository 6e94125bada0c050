"""The report in a real browser: it opens without a complaint, its tables sort, its images open, at any width."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_inputs import DIGITS
from report_page import make_report

CHROMIUM = shutil.which("chromium")
LONG = "aeroplane_with_a_very_long_name_and_no_space_to_break_it"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "gpu", "quic", "sync"]
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    _, _, paths = make_report(tmp_path_factory.mktemp("report"), classes=[LONG, *DIGITS])
    return paths.report.as_uri()


@pytest.fixture
def visit(browser: Any, report: str) -> Iterator[Callable[..., Any]]:
    """Opens the report; afterwards there must be no complaint, and no request outside the page."""
    opened: list[Any] = []
    troubles: list[str] = []
    requests: list[str] = []

    def visit(width: int = 1200, colours: str = "light", **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours, **options)
        opened.append(page)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda request: troubles.append(request.url[:80]))
        page.on("request", lambda request: requests.append(request.url[:80]))
        page.goto(report)
        return page

    yield visit
    for page in opened:
        page.close()
    assert troubles == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_opens_and_fits(visit: Callable[..., Any], width: int, colours: str) -> None:
    page = visit(width, colours)
    assert page.locator("#attacks table").first.is_visible()
    images = page.locator("img").evaluate_all("images => images.map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) == 10 * 5
    assert all(complete and natural == 16 and shown > 40 for complete, natural, shown in images)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".gallery summary").first.click()
    for summary in page.locator("details:not([open]) > summary").all():
        if summary.is_visible():
            summary.evaluate("summary => { summary.parentElement.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_stands_out(visit: Callable[..., Any], colours: str) -> None:
    """WCAG 2.1 requires a contrast of 4.5 between text and what lies behind it."""
    page = visit(colours=colours)

    def luminance(colour: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def colour(selector: str, kind: str) -> float:
        return luminance(page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{kind}"))

    behind = [colour("html", "backgroundColor"), colour(".summary li", "backgroundColor")]
    assert (max(behind) < 0.1) == (colours == "dark")
    for selector in ("body", ".note", ".headline strong", "#checks .right", "#images .wrong", "figcaption"):
        front = colour(selector, "color")
        for back in behind:
            assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5, selector


def test_a_click_on_a_heading_sorts(visit: Callable[..., Any]) -> None:
    page = visit()
    table = page.locator("#classes table").first
    names = table.locator("tbody th")
    before = names.all_text_contents()
    assert before == [LONG, *DIGITS]
    heading = table.locator("thead th", has_text="Worst").first

    def shares() -> list[float]:
        return [float(text.strip("%")) for text in table.locator("tbody td:nth-child(5)").all_text_contents()]

    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert shares() == sorted(shares())
    assert names.all_text_contents() != before
    page.keyboard.press("Enter")  # the button has the focus
    assert heading.get_attribute("aria-sort") == "descending"
    assert shares() == sorted(shares(), reverse=True)
    table.locator("thead th").first.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert names.all_text_contents() == [*DIGITS, LONG]


def test_dashes_stay_last(visit: Callable[..., Any]) -> None:
    page = visit()
    heading = page.locator("#attacks thead th", has_text="Steps").first
    steps = page.locator("#attacks table.sortable tbody td:nth-child(6)")
    for direction in ("ascending", "descending"):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == direction
        assert steps.all_text_contents()[-1] == "—"


def test_an_image_opens_large(visit: Callable[..., Any]) -> None:
    page = visit()
    card = page.locator(".gallery li").first
    small = card.locator("img").first.evaluate("image => image.clientWidth")
    assert not card.locator("table").is_visible()
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    assert card.locator("img").first.evaluate("image => image.clientWidth") > 1.8 * small
    assert "AutoAttack standard" in card.locator("table").inner_text()
    card.locator("summary").click()
    assert not card.locator("table").is_visible()


def test_page_is_complete_without_its_script(visit: Callable[..., Any]) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator("thead button").count() == 0
    page.locator(".gallery summary").first.click()
    assert page.locator(".gallery table").first.is_visible()


def test_page_prints(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(colours="dark")
    page.emulate_media(media="print")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.pdf(path=tmp_path / "report.pdf", format="A4")
