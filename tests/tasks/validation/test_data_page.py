"""The page `reports/data.html`: self-contained, of bounded size, and readable in a browser."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from validation_inputs import make_pictures, picture_limits, prepare_pictures

from d2r_core.data import Split
from d2r_core.errors import UserError
from tasks import validate
from tasks.validation import data_report, tables
from tasks.validation.great_expectations_runner import Finding, Offender


def render_page(splits: dict[str, Split], classes: list[str], **changes: Any) -> str:
    names = {name: [f"{name}[{index}]" for index in range(len(split))] for name, split in splits.items()}
    counts = {
        name: {"images": len(split), "per_class": split.labels.bincount(minlength=len(classes)).tolist()}
        for name, split in splits.items()
    }
    manifest = {"source": "x", "path": "y", "classes": classes, "image_size": 64, "hash": "0" * 64, "splits": counts}
    images = tables.images(splits, classes, names)
    arguments: dict[str, Any] = {"findings": [], "drift": None, "quarantine": [], "stops": False} | changes
    return data_report.render(splits, images, manifest, **arguments)


def random_splits(classes: int, per_class: int, side: int) -> dict[str, Split]:
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for name, count in (("train", per_class), ("validation", 1), ("test", 2)):
        pixels = torch.randint(0, 256, (classes * count, 3, side, side), generator=generator, dtype=torch.uint8)
        splits[name] = Split(pixels, torch.arange(classes).repeat(count))
    return splits


def test_the_page_stays_small_and_self_contained_with_many_classes() -> None:
    classes = [f"<class> & {number}" for number in range(200)]
    offenders = [Offender(f"train[{i}]", {"shared_with": "test[0]"}) for i in range(100_000)]
    findings = [Finding("a < b", "10 of 9 fail", "none & nothing", False, "error", "why", "images", offenders)]
    page = render_page(random_splits(200, 8, 64), classes, findings=findings, stops=True)
    assert len(page) < 6e6, "even with noise, which does not compress"
    assert "99,990 more" in page
    assert "a &lt; b" in page
    assert "<class>" not in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', page)) <= {"data:"} | set(
        re.findall(r'href="(#[^"]{0,4})', page)
    )
    assert page.count('class="mean"') == 200


def test_a_page_of_empty_splits_can_be_made() -> None:
    empty = {
        name: Split(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
        for name in ("train", "test")
    }
    assert "0 images" in render_page(empty, ["cat", "dog"], stops=True)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "colours"), [(390, "dark"), (1200, "light")])
def test_the_page_opens_in_a_browser(tmp_path: Path, browser: Any, width: int, colours: str) -> None:
    folder = make_pictures(tmp_path)
    shutil.copy(folder / "train/cat/00.png", folder / "test/dog" / ("a_name_without_any_space" * 6 + ".png"))
    paths = prepare_pictures(tmp_path)
    with pytest.raises(UserError, match="one label for the same pixels"):
        validate.run(picture_limits(), paths)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("requestfailed", lambda request: problems.append(request.url[:80]))
    page.goto(paths.data_page.as_uri())
    assert page.locator("#validation table").is_visible()
    images = page.locator("img").evaluate_all("images => images.map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) > 15
    assert all(complete and natural == 32 and displayed > 40 for complete, natural, displayed in images)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert problems == []
    page.close()
