"""The page reports/decision.html: the gate's decision, rule by rule, with the look of the report."""

from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from d2r_core import files
from tasks.registry.decision import Decision, Rule
from tasks.reporting import charts, rendering


class RuleRow(NamedTuple):
    rule: Rule
    figures: list[tuple[str, str]]  # for people: name and value
    plot: Markup | None  # of the difference to the champion


def write(decision: Decision, path: Path) -> None:
    """Write the page, which needs no other file; the same decision gives the same bytes."""
    intervals = [rule.interval for rule in decision.rules if rule.interval]
    reach = 1.1 * max((abs(bound) for interval in intervals for bound in interval), default=0.0) or 1.0
    rows = [_row(rule, reach) for rule in decision.rules]
    failed = [rule for rule in decision.rules if rule.verdict == "failed"]
    files.write_text(path, rendering.render("decision.html.j2", {"decision": decision, "rows": rows, "failed": failed}))


def _row(rule: Rule, reach: float) -> RuleRow:
    figures = [(name.replace("_", " "), _figure(figure)) for name, figure in rule.figures.items()]
    plot = None
    if rule.interval is not None:
        difference = rule.figures.get("difference", rule.figures["challenger"] - rule.figures["champion"])
        plot = charts.difference(difference, rule.interval, reach)
    return RuleRow(rule, figures, plot)


def _figure(figure: float) -> str:
    """A count as it is, and an accuracy, a difference or p with four significant digits."""
    return f"{figure:.4g}"
