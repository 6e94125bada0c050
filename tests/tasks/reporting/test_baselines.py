"""What the report shows beside the model: the champion, and published results."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_inputs import make_inputs, write
from report_page import Page
from safetensors.numpy import load_file, save_file

from d2r_core.errors import UserError
from tasks import report
from tasks.config.paths import Paths
from tasks.reporting import literature


def make_comparison(paths: Paths, **changes: Any) -> None:
    robustness = json.loads(paths.robustness.read_text())
    row = {"name": "CW-20", "images": 120, "challenger": 0.7, "champion": 0.75, "difference": -0.05}
    row |= {"interval": [-0.083, -0.0125], "only_challenger": 3, "only_champion": 9}
    comparison = {
        "champion": {"version": 4, "weights_sha256": "cc" * 32},
        "challenger": {"weights_sha256": robustness["models"]["target"]["weights_sha256"]},
        "data_hash": robustness["data"]["hash"],
        "evaluation_hash": robustness["settings_hash"],
        "attacks": {"cw": row},
    }
    write(paths.comparison, comparison | changes)


def test_champion_is_compared(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    make_comparison(paths)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert "version 4" in text
    assert "-5.0-8.3 to -1.2" in text.replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attacks": None, "reason": "It was measured on other data."}, "It was measured on other data."),
        ({"challenger": {"weights_sha256": "00" * 32}}, "the last comparison was of other figures"),
        ({"data_hash": "00" * 32}, "the last comparison was of other figures"),
        ({"evaluation_hash": "00" * 32}, "the last comparison was of other figures"),
    ],
)
def test_a_missing_comparison_has_a_reason(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    settings, paths = make_inputs(tmp_path)
    make_comparison(paths, **changes)
    report.run(settings, paths)
    page = Page(paths.report).text
    assert text in page
    assert "Only challenger" not in page


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
    results = literature.find_published(source, image_size, norm, eps)
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
        key: np.repeat(np.repeat(array, 2, -1), 2, -2) if array.ndim == 4 else array for key, array in gallery.items()
    }
    save_file(bigger, paths.gallery)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert "s figures, not measured here" in text
    assert "58.04%" in text
