"""The study's results as Markdown: a table of the cells, and the gradients of the loss terms where it may collapse."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study_cells import CELLS, describe

from d2r_core import files

Results = Mapping[str, Mapping[str, dict[str, Any]]]  # cell -> seed -> what study_training.measure returns

_ATTACKS = {"clean": "clean", "pgd": "PGD-20", "cw": "CW-20", "autoattack": "APGD-CE + APGD-T"}
_STEPS = (1, 2, 3, 5, 10, 20, 50, 100, 150, 200)  # of the table of gradients
_BLOCK = re.compile(r"^<!-- study -->\n.*?^<!-- /study -->\n", re.DOTALL | re.MULTILINE)


def table(results: Results) -> str:
    """One row for each cell that was measured, in the order of the list."""
    lines = [
        f"| cell | {' | '.join(_ATTACKS.values())} | training | rate, schedule, decay |",
        "|---|" + "---|" * (len(_ATTACKS) + 2),
    ]
    for key in CELLS:
        if by_seed := results.get(key):
            lines.append(f"| {CELLS[key].title} | {' | '.join(_figures(list(by_seed.values())))} |")
    return "\n".join(lines) + "\n"


def _figures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracies, time and settings of one cell, of one or several seeds."""
    choice = describe(runs[0]["choice"])
    if failed := [run["failed"] for run in runs if "failed" in run]:
        return [f"**{failed[0].partition(': the loss')[0]}: not finite**", *[""] * (len(_ATTACKS) - 1), "", choice]
    accuracies = [_accuracy([run["accuracies"][attack] for run in runs]) for attack in _ATTACKS]
    minutes = sum(run["train_seconds"] for run in runs) / len(runs) / 60
    note = " (**at chance**)" if any(run["collapsed"] for run in runs) else ""
    return [accuracies[0] + note, *accuracies[1:], f"{minutes:.1f} min", choice]


def _accuracy(figures: Sequence[Mapping[str, Any]]) -> str:
    """With Wilson's 95 % interval for one seed; mean and range for several."""
    values = [figure["accuracy"] for figure in figures]
    if len(values) == 1:
        low, high = figures[0]["interval"]
        return f"{values[0]:.1%} ({low:.1%} to {high:.1%})"
    return f"{sum(values) / len(values):.1%} [{min(values):.1%} to {max(values):.1%}, {len(values)} seeds]"


def gradient_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Value and gradient norm (target, guidance) of each loss term in some of the first steps."""
    steps = [row for row in rows if "failed" not in row]
    terms = list(steps[0])[1:]
    lines = [f"| step | {' | '.join(terms)} |", "|---|" + "---|" * len(terms)]
    last = steps[-1]["step"]
    for row in steps:
        if row["step"] in _STEPS or row["step"] == last:
            cells = (" / ".join(f"{value:.3g}" for value in row[term].values()) for term in terms)
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    failed = [row["failed"] for row in rows if "failed" in row]
    return "\n".join(lines) + "\n" + "".join(f"\n{message}\n" for message in failed)


def text(results: Results, gradients: Mapping[str, Path], head: str) -> str:
    """Everything that was measured, as Markdown."""
    parts = [head, table(results)]
    for key, path in gradients.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        parts.append(
            f"**{CELLS[key].title}**: each loss term in the first steps, as value / norm of its gradient in the target "
            "/ in the guidance.\n"
        )
        parts.append(gradient_table(rows))
    return "\n".join(parts)


def write(path: Path, block: str) -> None:
    """Replace the study's block of the file, or append it; the rest stays byte for byte."""
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"<!-- study -->\n{block.strip()}\n<!-- /study -->\n"
    if _BLOCK.search(content):
        content = _BLOCK.sub(lambda match: block, content, count=1)
    else:
        content = f"{content.rstrip()}\n\n{block}".lstrip()
    files.write_text(path, content)
