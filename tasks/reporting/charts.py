"""Charts as inline SVG: crisp at any size, and coloured by the page's style sheet, so that they follow light and dark.

Every text is escaped. Shapes and dash patterns, not colours alone, tell the series apart.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 318, 20, 196  # the plot's edges; the lines' names are to the right of it
_LINE_GAP = 13  # between two names
_MAX_TICKS = 7
_ROUND = [float(f"{digit}e{power}") for power in range(-9, 9) for digit in (1, 2, 5)]
_DOUBLING = [2**power for power in range(8)]

Ticks = Sequence[tuple[float, str]]  # values with their names
Place = Callable[[float], float]  # value -> x or y
Scale = tuple[Ticks, Place]


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    style: str  # the style sheet's class
    values: Sequence[float]  # one for each point of the axis; NaN where nothing was measured
    intervals: Sequence[tuple[float, float]] | None = None  # drawn as a band; NaN as above


class Axis(NamedTuple):
    """What lies below a chart."""

    title: str
    values: Sequence[float]  # ascending, at least one
    ticks: Ticks
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """From 0 (the first value) to 1 (the last)."""
        first, last, value = (math.log(x) if self.logarithmic else x for x in (self.values[0], self.values[-1], value))
        return 0.5 if first == last else (value - first) / (last - first)


class Mark(NamedTuple):
    """One figure on a strip."""

    shape: Literal["bar", "tick", "dot", "ring"]  # a bar starts at 0
    style: str  # the style sheet's class
    value: float | None  # in [0, 1]; None is not drawn
    interval: tuple[float, float] | None = None  # drawn as a line through it


def epochs(numbers: Sequence[int]) -> Axis:
    """The epochs of a training."""
    return Axis("epoch", numbers, [(number, str(number)) for number in _epoch_ticks(numbers)])


def radii(values: Sequence[float], norm: str) -> Axis:
    """Sizes of perturbations, from 0; in grey levels, where all of them are whole ones."""
    whole = all(abs(255 * eps - round(255 * eps)) < 0.01 for eps in values)
    scale, unit = (255, "/255") if whole else (1, "")
    last = scale * values[-1]
    step = next(step for step in (_DOUBLING if whole else _ROUND) if last / step < _MAX_TICKS)
    ticks = [number * step for number in range(math.floor(last / step + 1e-6) + 1)]
    return Axis(f"{norm} eps", values, [(tick / scale, f"{tick:.3g}{unit if tick else ''}") for tick in ticks])


def steps(numbers: Sequence[int]) -> Axis:
    """Numbers of steps of an attack, by their ratios."""
    return Axis("steps", numbers, [(number, str(number)) for number in numbers], logarithmic=True)


def curves(
    axis: Axis,
    series: Sequence[Series],
    *,
    scale: Literal["percent", "log"],
    description: str,
    marked: tuple[float, str] | None = None,
) -> Markup:
    """Lines over an axis, each named at its end, with their intervals as bands.

    Args:
        scale: "percent" for accuracies in [0, 1], drawn on the whole range from 0 to 100 %; "log" for losses (values
            that are not positive are left out).
        description: what the chart shows, for those who do not see it.
        marked: a value of the axis and its label; left out if the axis has no such value.
    """
    ticks, y = (
        _percent_scale() if scale == "percent" else _log_scale([value for line in series for value in line.values])
    )

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * axis.place(value)

    parts = _grid(axis, ticks, x, y)
    mark = marked[0] if marked and marked[0] in axis.values else None
    if marked and mark is not None:
        parts.append(
            Markup('<line class="marked" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>').format(_TOP, _BOTTOM, x=x(mark))
        )
        parts.append(_text(x(mark), _TOP - 7, marked[1], f"mark {'end' if axis.place(mark) > 0.5 else 'start'}"))

    drawn = []
    for line in series:
        points = [
            (x(place), y(value), place)
            for place, value in zip(axis.values, line.values, strict=True)
            if math.isfinite(value) and (scale == "percent" or value > 0)
        ]
        if points:
            drawn.append((line, points[-1][1]))
            parts += _line(axis, line, points, mark, x, y)
    heights = _spread([height for _, height in drawn])
    for (line, height), text_height in zip(drawn, heights, strict=True):
        parts.append(
            Markup('<polyline class="leader" points="{},{:.1f} {},{:.1f}"/>').format(
                _RIGHT + 2, height, _RIGHT + 9, text_height
            )
        )
        parts.append(_text(_RIGHT + 12, text_height + 4, line.name, "name"))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, description, Markup("").join(parts)
    )


def _grid(axis: Axis, ticks: Ticks, x: Place, y: Place) -> list[Markup]:
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(_LEFT, _RIGHT, y=y(tick))
        for tick, _ in ticks
    ]
    parts += [_text(_LEFT - 6, y(tick) + 4, name, "axis end") for tick, name in ticks]
    parts += [_text(x(tick), _BOTTOM + 16, name, "axis middle") for tick, name in axis.ticks]
    return [*parts, _text((_LEFT + _RIGHT) / 2, _BOTTOM + 31, axis.title, "axis middle")]


def _line(
    axis: Axis,
    line: Series,
    points: Sequence[tuple[float, float, float]],  # x, y, and the value of the axis
    mark: float | None,
    x: Place,
    y: Place,
) -> list[Markup]:
    parts = []
    if line.intervals:
        bounds = [
            (x(place), y(low), y(high))
            for place, (low, high) in zip(axis.values, line.intervals, strict=True)
            if math.isfinite(low)
        ]
        edge = [(px, high) for px, _, high in bounds] + [(px, low) for px, low, _ in reversed(bounds)]
        parts.append(Markup('<polygon class="band {}" points="{}"/>').format(line.style, _path(edge)))
    parts.append(Markup('<polyline class="line {}" points="{}"/>').format(line.style, _path([p[:2] for p in points])))
    parts += [
        Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.style, px, py)
        for px, py, place in points
        if line.intervals or place == mark or len(points) == 1
    ]
    return parts


def strip(marks: Sequence[Mark]) -> Markup:
    """Figures on one line from 0 to 100 %, as wide as its place; later marks lie over earlier ones.

    For a row of a table that also holds them as numbers, so it is hidden from those who do not see it.
    """
    elements = {
        "bar": '<rect class="{}" x="0" width="{:.2f}%" y="4" height="10"/>',
        "tick": '<line class="{}" x1="{x:.2f}%" x2="{x:.2f}%" y1="1" y2="17"/>',
        "dot": '<circle class="dot {}" cx="{:.2f}%" cy="9" r="4.5"/>',
        "ring": '<circle class="ring {}" cx="{:.2f}%" cy="9" r="4.5"/>',
    }
    whisker = '<line class="whisker {}" x1="{:.2f}%" x2="{:.2f}%" y1="9" y2="9"/>'
    parts = []
    for shape, style, value, interval in marks:
        if interval:
            parts.append(Markup(whisker).format(style, *(100 * bound for bound in interval)))
        if value is not None:
            parts.append(Markup(elements[shape]).format(style, 100 * value, x=100 * value))
    return Markup('<svg class="strip" aria-hidden="true"><line class="grid" x2="100%" y1="9" y2="9"/>{}</svg>').format(
        Markup("").join(parts)
    )


def difference(value: float, interval: tuple[float, float], reach: float) -> Markup:
    """A difference of two accuracies with its interval, on a line from -reach to +reach with 0 in its middle.

    Hidden from those who do not see it, as `strip` is.
    """
    low, middle, high = (50 + 50 * bound / reach for bound in (interval[0], value, interval[1]))
    return Markup(
        '<svg class="strip" aria-hidden="true"><line class="grid" x2="100%" y1="9" y2="9"/>'
        '<line class="zero" x1="50%" x2="50%" y1="0" y2="18"/>'
        '<line class="whisker target" x1="{:.2f}%" x2="{:.2f}%" y1="9" y2="9"/>'
        '<circle class="dot target" cx="{:.2f}%" cy="9" r="4.5"/></svg>'
    ).format(low, high, middle)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _percent_scale() -> Scale:
    ticks = [(tick / 100, f"{tick}%") for tick in (0, 25, 50, 75, 100)]
    return ticks, lambda value: _BOTTOM - (_BOTTOM - _TOP) * value


def _log_scale(values: Sequence[float]) -> Scale:
    """From one of 1, 2, 5 x 10^n below all positive values to one above; ticks at all of these, or at the decades."""
    positive = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    decades = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    low = max((step for step in steps if step <= min(positive)), default=steps[0])
    high = min((step for step in steps if step >= max(positive) and step > low), default=steps[-1])
    inside = [step for step in steps if low <= step <= high]
    if len(inside) > _MAX_TICKS:
        inside = [step for step in inside if f"{step:e}".startswith("1")]
    span = math.log(high / low)
    return [
        (step, f"{step:g}") for step in inside
    ], lambda value: _BOTTOM - (_BOTTOM - _TOP) * math.log(value / low) / span


def _epoch_ticks(epochs: Sequence[int]) -> list[int]:
    """Some of the epochs: the first, and multiples of a round step."""
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200) if len(epochs) / s < _MAX_TICKS), len(epochs))
    multiples = [epoch for epoch in epochs if epoch % step == 0]
    crowded = bool(multiples) and 0 < multiples[0] - epochs[0] < step / 2
    return multiples if epochs[0] in multiples or crowded else [epochs[0], *multiples]


def _spread(heights: Sequence[float]) -> list[float]:
    """Move heights apart until each has `_LINE_GAP`, keeping their order and staying inside the plot."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + _LINE_GAP)
    limit = float(_BOTTOM)
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - _LINE_GAP
    return moved
