"""`d2r compare`: two registered versions beside each other, image by image."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows.registry_commands import print_table, project

if TYPE_CHECKING:
    from tasks.registry.version_comparison import AttackPair

Reference = Annotated[str, typer.Argument(help="a version's number, champion or challenger; `d2r models` lists them")]


def compare(a: Reference, b: Reference) -> None:
    """Compare two versions image by image.

    Both must have been evaluated on the same test images. Prints a table and writes reports/compare-A-B.html.
    """
    from rich.table import Table

    from tasks.registry import version_comparison, version_comparison_page

    settings, paths = project()
    comparison = version_comparison.compare(settings, paths, (a, b))
    first, second = f"version {comparison.a}", f"version {comparison.b}"
    title = f"{comparison.model_name}: {first} and {second} on the same images"
    _print_pairs(title, "attack", comparison.attacks, (first, second))
    _print_pairs(f"under {comparison.attacks[-1].name}", "class", comparison.classes, (first, second))
    for reason in comparison.left_out:
        typer.echo(f"not compared: {reason}")
    differences = Table("differs", first, second)
    for difference in comparison.differences:
        differences.add_row(*difference)
    if comparison.differences:
        print_table(differences)
    page = paths.reports / f"compare-{comparison.a}-{comparison.b}.html"
    version_comparison_page.write(comparison, page)
    typer.echo(f"page  {page}")


def _print_pairs(title: str, what: str, pairs: "list[AttackPair]", names: tuple[str, str]) -> None:
    from rich.table import Table

    only = (f"only {name}" for name in names)
    table = Table(what, "images", *names, "difference [95 %]", *only, "McNemar p", title=title)
    for row in pairs:
        low, high = row.interval
        table.add_row(
            row.name,
            str(row.images),
            f"{row.a:.2%}",
            f"{row.b:.2%}",
            f"{row.difference:+.2%} [{low:+.2%}, {high:+.2%}]",
            str(row.only_a),
            str(row.only_b),
            f"{row.p:.2g}",
        )
    print_table(table)
