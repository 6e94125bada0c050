"""`d2r data`: a user's own data as versions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

_SHOWN = 10  # entries of a kind

app = typer.Typer(
    help="Put your own data under DVC, list it, compare versions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="a folder of images, or an archive")],
    name: Annotated[str, typer.Option("--name", help="what the data set is called")],
    force: Annotated[bool, typer.Option("--force", help="make it the new version of a name that is taken")] = False,
) -> None:
    """Put a folder or an archive under DVC, as data/raw/NAME."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    folder, new = dataset_versions.add(path, name, Paths(), force=force)
    if not new:
        typer.echo(f"{folder} holds this content already.")
        return
    typer.echo(f"{folder} is under DVC. To train on it: prepare.path: {folder} (params.yaml), then `d2r run`.")
    typer.echo(f"To keep this version: git add {folder}.dvc, git commit, `dvc push`.")


@app.command("list")
def listing() -> None:
    """List the data sets and say which one params.yaml names."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    found = dataset_versions.versions(Paths())
    if not found:
        typer.echo("No data set is under DVC yet: `d2r data add PATH --name NAME` adds one.")
    width = max((len(version.name) for version in found), default=0)
    for version in found:
        where = "" if version.here else "not here (dvc pull)"
        used = "used by params.yaml" if version.used else ""
        notes = ", ".join(note for note in (used, where) if note)
        line = f"{version.name:<{width}}  {version.bytes:>15,} bytes  {version.md5}  {notes}"
        typer.echo(line.rstrip())


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="a name, a path, or NAME@REVISION of git")],
    after: Annotated[str, typer.Argument(metavar="B", help="the same, of the other version")],
) -> None:
    """Say what was added, removed and relabelled from A to B."""
    from tasks.config.paths import Paths
    from tasks.pipeline import dataset_versions

    found = dataset_versions.compare(before, after, Paths())
    for what, names in (("added", found.added), ("removed", found.removed), ("relabelled", found.relabelled)):
        _show(what, names)
    typer.echo(f"same: {found.same}")


def _show(what: str, names: Sequence[str]) -> None:
    typer.echo(f"{what}: {len(names)}")
    for name in names[:_SHOWN]:
        typer.echo(f"  {name}")
    if len(names) > _SHOWN:
        typer.echo(f"  and {len(names) - _SHOWN} more")
