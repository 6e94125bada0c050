"""The page reports/compare-A-B.html: two versions side by side, with the look of the report."""

from pathlib import Path

from d2r_core import files
from tasks.registry.version_comparison import VersionComparison
from tasks.reporting import charts, rendering


def write(comparison: VersionComparison, path: Path) -> None:
    """Write the page, which needs no other file; the same comparison gives the same bytes."""
    pairs = [*comparison.attacks, *comparison.classes]
    reach = 1.1 * max((abs(bound) for row in pairs for bound in row.interval), default=0.0) or 1.0
    plots = {
        name: [charts.difference(row.difference, row.interval, reach) for row in rows]
        for name, rows in (("attacks", comparison.attacks), ("classes", comparison.classes))
    }
    files.write_text(path, rendering.render("compare.html.j2", {"comparison": comparison, "plots": plots}))
