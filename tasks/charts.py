"""Charts as inline SVG: crisp at any size, and coloured by the page's style sheet, so that they follow light and dark.

Every text is escaped. Shapes and dash patterns, not colours alone, tell the series apart.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 318, 20, 196  # the plot's edges; names of the lines stand to the right of it
_LINE_GAP = 13  # between two names
_MAX_TICKS = 7


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    style: str  # the style sheet's class
    values: Sequence[float]  # one for each epoch; NaN where nothing was measured


class Mark(NamedTuple):
    """One figure on a strip."""

    shape: Literal["bar", "tick", "dot", "ring"]  # a bar starts at 0
    style: str  # the style sheet's class
    value: float | None  # in [0, 1]; None is not drawn


def curves(
    epochs: Sequence[int],
    series: Sequence[Series],
    *,
    scale: Literal["percent", "log"],
    description: str,
    kept: int | None = None,
) -> Markup:
    """Lines over epochs, each named at its end.

    Args:
        epochs: at least one, ascending.
        scale: "percent" for accuracies in [0, 1], drawn on the whole range from 0 to 100 %; "log" for losses (values
            that are not positive are left out).
        description: what the chart shows, for those who do not see it.
        kept: the epoch whose checkpoint was kept, marked if it is one of `epochs`.
    """
    ticks, y = _percent_axis() if scale == "percent" else _log_axis([value for line in series for value in line.values])

    def x(epoch: int) -> float:
        first, last = epochs[0], epochs[-1]
        return (_LEFT + _RIGHT) / 2 if first == last else _LEFT + (_RIGHT - _LEFT) * (epoch - first) / (last - first)

    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(_LEFT, _RIGHT, y=y(tick))
        for tick, _ in ticks
    ]
    parts += [_text(_LEFT - 6, y(tick) + 4, name, "axis end") for tick, name in ticks]
    parts += [_text(x(epoch), _BOTTOM + 16, str(epoch), "axis middle") for epoch in _epoch_ticks(epochs)]
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 31, "epoch", "axis middle"))
    if kept in epochs:
        assert kept is not None
        parts.append(
            Markup('<line class="kept" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>').format(_TOP, _BOTTOM, x=x(kept))
        )
        side = "end" if x(kept) > (_LEFT + _RIGHT) / 2 else "start"
        parts.append(_text(x(kept), _TOP - 7, f"kept: epoch {kept}", f"epoch {side}"))

    drawn = []
    for line in series:
        points = [
            (x(epoch), y(value), epoch)
            for epoch, value in zip(epochs, line.values, strict=True)
            if math.isfinite(value) and (scale == "percent" or value > 0)
        ]
        if not points:
            continue
        drawn.append((line, points[-1][1]))
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(line.style, path))
        parts += [
            Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.style, px, py)
            for px, py, epoch in points
            if epoch == kept or len(points) == 1
        ]
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
    parts = [
        Markup(elements[shape]).format(style, 100 * value, x=100 * value)
        for shape, style, value in marks
        if value is not None
    ]
    return Markup('<svg class="strip" aria-hidden="true"><line class="grid" x2="100%" y1="9" y2="9"/>{}</svg>').format(
        Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


Axis = tuple[list[tuple[float, str]], Callable[[float], float]]  # ticks with their names, and value -> height


def _percent_axis() -> Axis:
    ticks = [(tick / 100, f"{tick}%") for tick in (0, 25, 50, 75, 100)]
    return ticks, lambda value: _BOTTOM - (_BOTTOM - _TOP) * value


def _log_axis(values: Sequence[float]) -> Axis:
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
