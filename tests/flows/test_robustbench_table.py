"""The table of RobustBench's entries in docs/evaluation.md: every row is a model that `d2r evaluate` builds."""

import re
from pathlib import Path

import pytest
import torch
import typer.main
from project import ROOT

from d2r_core import models
from flows import checkpoint_options, evaluate_command

SECTION = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").partition("### RobustBench")[2]
LOADED, _, REFUSED = SECTION.partition("## Self-checks")[0].partition("Refused, whichever")

ARCHITECTURE = ["depth", "widen_factor", "width", "strides", "shortcut_from", "final_norm", "activation", "normalize"]
ARCHITECTURE += ["mean", "std"]
app = typer.Typer()
app.command()(evaluate_command.evaluate)
COMMAND = typer.main.get_command(app)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]


@pytest.mark.parametrize("options", [row[0].strip("`") for row in rows(LOADED)])
def test_a_row_is_a_model(options: str) -> None:
    """On the meta device, which holds no weights: the largest have 370 million."""
    context = COMMAND.make_context("evaluate", ["--checkpoint", "x.pt", "--architecture", *options.split()])
    given = {key: context.params[key] for key in ARCHITECTURE}
    described = checkpoint_options.described(name=context.params["architecture"], **given)
    with torch.device("meta"):
        model = models.build(num_classes=10, image_size=32, **checkpoint_options.complete(Path("x.pt"), described))
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_no_entry_is_both_loaded_and_refused_or_missing() -> None:
    columns = ("CIFAR-10, Linf", "CIFAR-10, L2", "CIFAR-100, Linf")
    loaded = [
        (name, entry)
        for row in rows(LOADED)
        for name, cell in zip(columns, row[1:], strict=True)
        for entry in re.findall(r"`([^`]+)`", cell)
    ]
    counts = {name: sum(column == name for column, _ in loaded) for name in columns}
    assert len(set(loaded)) == len(loaded)
    # RobustBench has 76, 21 and 38
    assert counts == {"CIFAR-10, Linf": 59, "CIFAR-10, L2": 18, "CIFAR-100, Linf": 31}
    assert {entry for row in rows(REFUSED) for entry in re.findall(r"`([^`]+)`", row[0])}
