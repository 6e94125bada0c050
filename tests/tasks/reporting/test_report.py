"""The report and the model card: every figure is there, nothing is loaded from elsewhere, any name is harmless."""

import base64
import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from report_inputs import ROOT, Page, make_inputs, make_report, write
from safetensors.numpy import load_file, save_file

from d2r_core.errors import UserError
from tasks import report
from tasks.config.paths import Paths
from tasks.reporting import charts, literature, rendering, robustness_figures


def test_every_figure_is_on_the_page_and_the_card(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    for model in json.loads(paths.robustness.read_text())["models"].values():
        for attack in model["attacks"].values():
            low, high = (f"{100 * bound:.1f}" for bound in attack["interval"])
            figure, interval = f"{100 * attack['accuracy']:.1f}%", f"{low} to {high}%"
            assert figure + interval in page.text
            assert re.search(rf"\| {attack['name']} \|.* {attack['images']} \|.*{figure} \({interval}\)", card)
        for check in model["checks"]:
            assert check["found"] in page.text
        for share in model["attacks"]["worst"]["per_class"]:
            assert f"{100 * share:.1f}%" in page.text or model["architecture"]["name"] == "resnet18"
        for point in [*model["curves"]["eps"], *model["curves"]["steps"]]:
            assert f"{100 * point['accuracy']:.1f}% " in page.text
    for said in (
        "L∞ 0.1",
        "20 steps of 0.025",
        "kept: epoch 27",
        "no constant image",
        "train[17]",
        "7a" * 32,
        "71.2%",  # standing after AutoAttack's first stage
        "\N{MULTIPLICATION SIGN} 10",
        "falls at eps 0.025",
        "falls at no eps that was tried",
    ):
        assert said in page.text
    assert "expected of more\\_steps | passed" in card


def test_failed_self_check_stands_above_everything(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = json.loads(paths.robustness.read_text())
    robustness["models"]["target"]["checks"][4] |= {"passed": False, "found": "87 of 100 are blind."}
    write(paths.robustness, robustness)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert (
        text.index(f"1 of {len(robustness_figures.CHECKS)} self-checks failed")
        < text.index("87 of 100 are blind.")
        < text.index("Accuracy under")
    )
    assert "do not rely on the figures" in paths.model_card.read_text()


def test_every_self_check_is_explained() -> None:
    """The page is read offline: a check that is asked has its line there."""
    code = (ROOT / "d2r_core/evaluation/self_checks.py").read_text()
    keys = set(re.findall(r'Check\(\s*"(\w+)"', code))
    assert keys == set(robustness_figures.CHECKS)


def make_comparison(paths: Paths, **changes: Any) -> None:
    robustness = json.loads(paths.robustness.read_text())
    row = {"name": "CW-20", "images": 120, "challenger": 0.7, "champion": 0.75, "difference": -0.05}
    row |= {"interval": [-0.083, -0.0125], "only_challenger": 3, "only_champion": 9}
    found = {
        "champion": {"version": 4, "weights_sha256": "cc" * 32},
        "challenger": {"weights_sha256": robustness["models"]["target"]["weights_sha256"]},
        "data_hash": robustness["data"]["hash"],
        "evaluation_hash": robustness["settings_hash"],
        "attacks": {"cw": row},
    }
    write(paths.comparison, found | changes)


def test_champion_is_compared(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    make_comparison(paths)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert "version 4" in text
    assert "-5.0-8.3 to -1.2" in text.replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attacks": {}, "reason": "It was measured on other data."}, "It was measured on other data."),
        ({"challenger": {"weights_sha256": "00" * 32}}, "the last comparison was of other figures"),
        ({"data_hash": "00" * 32}, "the last comparison was of other figures"),
        ({"evaluation_hash": "00" * 32}, "the last comparison was of other figures"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings, paths = make_inputs(tmp_path)
    make_comparison(paths, **changes)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert said in text
    assert "Only challenger" not in text


def test_damaged_comparison_is_named(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    make_comparison(paths)
    paths.comparison.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(paths.comparison))):
        report.run(settings, paths)


@pytest.mark.parametrize(
    ("source", "image_size", "norm", "eps", "shown"),
    [
        ("cifar10", 32, "Linf", 8 / 255, True),
        ("cifar10", 32, "Linf", 0.031, True),
        ("cifar10", 32, "Linf", 0.1, False),
        ("cifar10", 16, "Linf", 8 / 255, False),
        ("cifar10", 32, "L2", 8 / 255, False),
        ("digits", 32, "Linf", 8 / 255, False),
        ("cifar100", 32, "Linf", 8 / 255, True),
        ("tiny_imagenet", 64, "Linf", 8 / 255, True),
    ],
)
def test_published_results_only_where_they_fit(
    source: str, image_size: int, norm: str, eps: float, shown: bool
) -> None:
    results = literature.of(source, image_size, norm, eps)
    assert bool(results) == shown
    assert results == sorted(results, key=lambda result: -result.autoattack)
    assert all(0.1 < result.autoattack < (result.clean or 1) <= 1 for result in results)


def test_published_results_are_marked_as_others(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    report.run(settings, paths)
    assert "not measured here" not in Page(paths.report).text
    robustness = json.loads(paths.robustness.read_text())
    robustness["data"]["source"] = "cifar10"
    robustness["models"]["target"]["attacks"]["pgd"]["eps"] = 8 / 255
    write(paths.robustness, robustness)
    gallery = load_file(paths.gallery)
    bigger = {
        key: np.repeat(np.repeat(found, 2, -1), 2, -2) if found.ndim == 4 else found for key, found in gallery.items()
    }
    save_file(bigger, paths.gallery)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert "s figures, not measured here" in text
    assert "58.04%" in text


def test_one_checkpoint_has_a_report_of_its_own(tmp_path: Path) -> None:
    """Without a chain there is no guidance model, no training, no data validation."""
    settings, paths = make_inputs(tmp_path)
    robustness = json.loads(paths.robustness.read_text())
    del robustness["models"]["guidance"]
    write(paths.robustness, robustness | {"checkpoint": "theirs/model.pt"})
    examples = pd.read_parquet(paths.examples)
    examples[examples["model"] == "target"].to_parquet(paths.examples)
    tensors = load_file(paths.gallery)
    save_file({name: array for name, array in tensors.items() if "guidance" not in name}, paths.gallery)
    paths.report.write_text(report.render(report.read(paths.reports), settings))
    page = Page(paths.report)
    assert page.text.count("theirs/model.pt") >= 2
    assert "The model is right on" in page.text
    assert "uidance " not in page.text
    assert "Validation" not in page.text
    assert len(page.images()) == settings.report.gallery_images * 3


@pytest.mark.parametrize("classes", [2, 20, 21, 200])
def test_confusions_of_few_and_of_many_classes(tmp_path: Path, classes: int) -> None:
    page, _, paths = make_report(tmp_path, classes=[f"class {number}" for number in range(classes)])
    matrix = [tag for tag, attributes in page.tags if "confusion" in (attributes.get("class") or "").split()]
    assert bool(matrix) == (classes <= 20)
    assert "The most frequent confusions" in page.text
    assert paths.report.stat().st_size < 1_000_000


def test_headline_says_what_the_figures_say(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    attacks = json.loads(paths.robustness.read_text())["models"]["target"]["attacks"]
    clean, worst = (f"{100 * attacks[key]['accuracy']:.1f}%" for key in ("clean", "worst"))
    assert f"right on {clean} of the clean test images and on {worst} under the worst attack" in page.text
    assert f"right on **{clean}** of the clean test images and on **{worst}**" in card


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page, _, paths = make_report(tmp_path)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(|@import|://", paths.report.read_text())


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    _, _, paths = make_report(tmp_path)
    text = paths.report.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_images_have_texts_and_regions_have_names(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all(
        "aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in page.tags if tag == "svg"
    )
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in ids | {None}
        assert (attributes.get("href") or "#attacks").removeprefix("#") in ids


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


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    _, _, first = make_report(tmp_path / "one")
    _, _, second = make_report(tmp_path / "two")
    assert first.report.read_bytes() == second.report.read_bytes()
    assert first.model_card.read_bytes() == second.model_card.read_bytes()


def test_guidance_without_pretraining_is_called_random(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, pretrain_epochs=0)
    assert "with the random weights it starts from" in page.text
    assert "Not pretrained (0 epochs)" in page.text
    assert "not pretrained: random weights" in card
    assert sum(attributes.get("class") == "chart" for _, attributes in page.tags) == 4


def test_absent_autoattack_is_said(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, autoattack_images=0)
    assert page.text.count("AutoAttack") == 1
    assert "AutoAttack was not run." in page.text
    assert "AutoAttack was not run." in card


def test_class_without_test_images_has_no_figure(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path, classes=["full", "empty", "other"], empty_class=1)
    assert "empty0———" in page.text


@pytest.mark.parametrize(
    ("eps", "printed"),
    [(8 / 255, "0.03137 (8/255)"), (0.031, "0.031"), (0.1, "0.1"), (1 / 255, "0.003922 (1/255)"), (0.001, "0.001")],
)
def test_eps_is_also_a_fraction_where_it_is_one(eps: float, printed: str) -> None:
    assert rendering.distance(eps) == printed


@pytest.mark.parametrize("artifact", ["manifest", "train_history", "robustness", "examples", "gallery"])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_missing_or_damaged_artifact_is_named(tmp_path: Path, artifact: str, damage: str) -> None:
    settings, paths = make_inputs(tmp_path)
    path: Path = getattr(paths, artifact)
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*`dvc repro"):
        report.run(settings, paths)
    assert not paths.report.exists()


@pytest.mark.parametrize("change", [("models", "target", "weights_sha256"), ("data", "hash")])
def test_figures_of_something_else_are_refused(tmp_path: Path, change: tuple[str, ...]) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = part = json.loads(paths.robustness.read_text())
    for key in change[:-1]:
        part = part[key]
    part[change[-1]] = "00" * 32
    write(paths.robustness, robustness)
    with pytest.raises(UserError, match=r"was measured on other (weights|data)"):
        report.run(settings, paths)
    assert not paths.report.exists()
    assert not paths.model_card.exists()


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        *itertools.product(["percent", "log"], [[0.5], [0.1, 0.9], [math.nan, 0.2, 0.0], [math.nan]]),
        ("log", [1e-6, 100.0, 3.0]),
        ("log", [5.0, 5.0]),
        ("log", [0.0, 0.0]),
    ],
)
def test_curves_of_any_history_are_drawn(scale: Any, values: list[float]) -> None:
    series = [charts.Series("<&", "target", values), charts.Series("other", "soft", values)]
    axis = charts.epochs(range(1, len(values) + 1))
    drawing = ElementTree.fromstring(
        charts.curves(axis, series, scale=scale, description='"a" < b', marked=(1, "here"))
    )
    assert drawing.get("aria-label") == '"a" < b'
    visible = [value for value in values if value > 0 or (scale == "percent" and value == 0)]
    assert [text.text for text in drawing if text.get("class") == "name"] == (["<&", "other"] if visible else [])
    for line in drawing.iter("polyline"):
        for number in re.split("[ ,]", line.get("points", "")):
            assert 0 <= float(number) <= 400


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ([0, 2 / 255, 8 / 255, 32 / 255], "32/255"),
        ([0.0, 0.025, 0.3], "0.3"),
        ([0, 0.5, 60.0], "60"),
        ([0, 1.0], "192/255"),
    ],
)
def test_distances_have_round_ticks(values: list[float], last: str) -> None:
    axis = charts.radii(values, "L∞")
    assert axis.ticks[0] == (0, "0")
    assert axis.ticks[-1][1] == last
    assert 3 <= len(axis.ticks) <= 8
    assert all(0 <= axis.place(tick) <= 1 + 1e-9 for tick, _ in axis.ticks)
