"""`d2r reproduce`: makes a registered version again, and says whether it came out the same."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.evaluation.report_schema import AttackFigures
    from tasks.reproduction.comparison import WeightsComparison
    from tasks.reproduction.reproduce import Reproduction


def reproduce(
    version: Annotated[int, typer.Argument(min=1, help="a version of the registered model; `d2r models` lists them")],
    train: Annotated[bool, typer.Option("--train", help="train both models again, too")] = False,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="where; by default state/reproductions/MODEL-VERSION")
    ] = None,
) -> None:
    """Make a version again, from its registry entry alone.

    In a folder of its own. Exit code 0: the same.
    """
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.reproduction.reproduce import reproduce as make_again

    paths = Paths()
    settings = settings_file.load(paths.params)
    folder = folder or paths.state / f"reproductions/{settings.promote.model_name}-{version}"
    result = make_again(settings, paths, version, folder, train=train, log=typer.echo)
    _print(result)
    if not result.same:
        raise typer.Exit(1)


def _print(result: "Reproduction") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "attack", "recorded", "reproduced", "same")
    for figure in result.figures:
        cells = (_figure(figure.recorded), _figure(figure.reproduced))
        table.add_row(figure.model, figure.attack, *cells, "yes" if figure.same else "NO")
    Console(markup=False).print(table)
    for line in _lines(result):
        typer.echo(line)


def _lines(result: "Reproduction") -> list[str]:
    different, total = result.predictions
    figures = sum(not figure.same for figure in result.figures)
    lines = [
        f"figures: {_counted(figures, len(result.figures))}",
        f"predictions: {_counted(different, total)}",
        *(_weights(weights) for weights in result.weights),
        *(f"differs from the record: {line}" for line in result.differences),
        f"folder: {result.project}",
        "reproduced: the same" if result.same else "NOT reproduced",
    ]
    if not result.same and not result.differences:
        lines.insert(-2, "Code, packages and machine are as recorded.")
    return lines


def _counted(different: int, total: int) -> str:
    return f"{different} of {total} differ" if different else f"all {total} the same"


def _weights(weights: "WeightsComparison") -> str:
    if weights.same:
        return f"{weights.model} weights: bitwise the same (SHA-256 {weights.recorded_sha256[:12]})"
    hashes = f"SHA-256 {weights.recorded_sha256[:12]} recorded, {weights.reproduced_sha256[:12]} here"
    return f"{weights.model} weights: {hashes}{f'; {weights.difference}' if weights.difference else ''}"


def _figure(figures: "AttackFigures | None") -> str:
    return "not run" if figures is None else f"{figures.accuracy:.2%} ({figures.correct} of {figures.images})"
