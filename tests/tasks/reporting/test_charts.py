"""Charts of any figures can be drawn."""

import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from tasks.reporting import charts


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
