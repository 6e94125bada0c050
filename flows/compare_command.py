"""`d2r compare`: two registered versions beside each other, image by image."""

import typer

from flows.registry_commands import Version, print_table, project


def compare(a: Version, b: Version) -> None:
    """Compare two versions image by image.

    Both must have been evaluated on the same test images. Prints a table and writes reports/compare-A-B.html.
    """
    from rich.table import Table

    from tasks.registry import version_comparison, version_comparison_page

    settings, paths = project()
    comparison = version_comparison.compare(settings, paths, a, b)
    header = ("attack", "images", f"version {a}", f"version {b}", "difference [95 %]", f"only {a}", f"only {b}", "p")
    table = Table(*header, title=f"{comparison.model_name}: versions {a} and {b} on the same images")
    for row in comparison.attacks:
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
    for reason in comparison.left_out:
        typer.echo(f"not compared: {reason}")
    differences = Table("differs", f"version {a}", f"version {b}")
    for difference in comparison.differences:
        differences.add_row(*difference)
    if comparison.differences:
        print_table(differences)
    page = paths.reports / f"compare-{a}-{b}.html"
    version_comparison_page.write(comparison, page)
    typer.echo(f"page  {page}")
