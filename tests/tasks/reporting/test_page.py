"""The report as a page: nothing is loaded from elsewhere, any name is harmless, images are what they seem."""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from report_inputs import make_inputs
from report_page import Page, make_report
from safetensors.numpy import load_file, save_file

from tasks import report
from tasks.reporting import rendering


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page, _, paths = make_report(tmp_path)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        if tag == "a" and attributes.get("href") == paths.decision_page.name:
            continue  # the page beside it, opened by a click and never loaded
        for name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
            if (tag, name, attributes.get(name)) != ("a", "href", "decision.html"):  # a link, which nothing here needs
                assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(|@import|://", paths.report.read_text())


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    _, _, paths = make_report(tmp_path)
    text = paths.report.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_images_have_texts_and_regions_have_names(tmp_path: Path) -> None:
    page, _, paths = make_report(tmp_path)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all(
        "aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in page.tags if tag == "svg"
    )
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert paths.decision_page.parent == paths.report.parent  # the one link to another page
    targets = ids | {paths.decision_page.name}
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in ids | {None}
        assert (attributes.get("href") or "#attacks").removeprefix("#") in targets


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    classes = ["<script>alert(1)</script>", "a|b", "*c*", "{{ 1 + 1 }}", 'd" onload="x']
    page, card, _ = make_report(tmp_path, classes=classes, promote={"model_name": "<u>m</u>"})
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert not any("onload" in attributes for _, attributes in page.tags)
    for label in classes:
        assert label in page.text
    assert "<script" not in card
    assert "u" not in {tag for tag, _ in page.tags}
    assert "<u>" not in card
    assert r"a\|b" in card
    assert r"\*c\*" in card


def test_perturbation_is_shown_ten_times_as_large(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path, report={"gallery_images": 1})
    tensors = load_file(paths.gallery)
    tensors["clean"][:] = 128
    step = np.full(tensors["clean"].shape[1:], 0.02) * (np.arange(16) > 8)
    tensors["target_adversarial"] = (tensors["clean"] / 255 + step).astype(np.float32)
    tensors["guidance_adversarial"] = (tensors["clean"] / 255 - 5 * step).astype(np.float32)
    save_file(tensors, paths.gallery)
    report.run(settings, paths)
    clean, target, ten_times, guidance, clipped = Page(paths.report).images()
    assert (clean == 128).all()
    assert (target[:, 9:] == round(128 + 255 * 0.02)).all()
    assert (ten_times[:, 9:] == round(255 * 0.7)).all()
    assert (ten_times[:, :9] == 128).all()
    assert (guidance[:, 9:] == round(128 - 255 * 0.1)).all()
    assert (clipped[:, 9:] == 0).all()


@pytest.mark.parametrize(
    ("eps", "printed"),
    [(8 / 255, "0.03137 (8/255)"), (0.031, "0.031"), (0.1, "0.1"), (1 / 255, "0.003922 (1/255)"), (0.001, "0.001")],
)
def test_eps_is_also_a_fraction_where_it_is_one(eps: float, printed: str) -> None:
    assert rendering.distance(eps) == printed
