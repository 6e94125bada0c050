"""`d2r data`: versions of a user's own data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

_MAX_LISTED = 10  # entries of each kind

app = typer.Typer(
    help="Add your own data to DVC, list it, compare versions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="a folder of images, or an archive")],
    name: Annotated[str, typer.Option("--name", help="name of the data set")],
    force: Annotated[bool, typer.Option("--force", help="make it the new version of an existing name")] = False,
) -> None:
    """Add a folder or an archive to DVC, as data/raw/NAME."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    folder, new = dataset_versions.add(path, name, Paths(), force=force)
    if not new:
        typer.echo(f"{folder} already has this content.")
        return
    typer.echo(f"{folder} is tracked by DVC. To train on it: prepare.path: {folder} (params.yaml), then `d2r run`.")
    typer.echo(f"To keep this version: git add {folder}.dvc, git commit, `dvc push`.")


@app.command("list")
def list_versions() -> None:
    """List the data sets and mark the one that params.yaml uses."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    versions = dataset_versions.versions(Paths())
    if not versions:
        typer.echo("There are no data sets yet: `d2r data add PATH --name NAME` adds one.")
    width = max((len(version.name) for version in versions), default=0)
    for version in versions:
        missing = "" if version.present else "not present (run `dvc pull`)"
        used = "used by params.yaml" if version.used else ""
        notes = ", ".join(note for note in (used, missing) if note)
        line = f"{version.name:<{width}}  {version.bytes:>15,} bytes  {version.md5}  {notes}"
        typer.echo(line.rstrip())


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="a name, a path, or NAME@GIT_REVISION")],
    after: Annotated[str, typer.Argument(metavar="B", help="the other version, likewise")],
) -> None:
    """Show what was added, removed and relabelled from A to B."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    changes = dataset_versions.compare(before, after, Paths())
    for kind, names in (("added", changes.added), ("removed", changes.removed), ("relabelled", changes.relabelled)):
        _print_names(kind, names)
    typer.echo(f"same: {changes.unchanged}")


def _print_names(kind: str, names: Sequence[str]) -> None:
    typer.echo(f"{kind}: {len(names)}")
    for name in names[:_MAX_LISTED]:
        typer.echo(f"  {name}")
    if len(names) > _MAX_LISTED:
        typer.echo(f"  and {len(names) - _MAX_LISTED} more")
