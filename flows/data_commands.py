"""`d2r data`: versions of a user's own data."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.config.paths import Paths

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

    paths = Paths()
    folder, new = dataset_versions.add(path, name, paths, force=force)
    if not new:
        typer.echo(f"{folder} already has this content.")
        return
    for line in _next_steps(folder, paths):
        typer.echo(line)


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


def _next_steps(folder: Path, paths: "Paths") -> Iterator[str]:
    """How to train on a new version and how to keep it, to paste: indented are settings and commands."""
    from tasks.config import settings as settings_file
    from tasks.pipeline import remote

    prepare = settings_file.load(paths.params).prepare
    yield f"{folder} is tracked by DVC."
    wanted = {"source": "image_folder", "path": folder.as_posix()}
    if {"source": prepare.source, "path": prepare.path} != wanted:
        yield "To train on it, replace these lines in the section `prepare` of params.yaml:"
        yield ""
        yield from (f"  {key}: {value}" for key, value in wanted.items())
        yield ""
        yield f"Images become {prepare.image_size} x {prepare.image_size} pixels: `image_size` in the same section."
    yield "To train:"
    yield ""
    yield "    d2r run"
    yield ""
    default = remote.default_remote(paths)
    yield "To keep this version, and the settings that use it:"
    yield ""
    yield f"    git add {folder.as_posix()}.dvc {folder.parent.as_posix()}/.gitignore params.yaml"
    yield f'    git commit -m "Data set {folder.name}"'
    if default:
        yield "    dvc push"
        return
    yield ""
    yield "Its content is in DVC's cache here alone. To share it, name a remote once, a folder or a bucket"
    yield "(`dvc remote add --default NAME URL`), then `dvc push`."


def _print_names(kind: str, names: Sequence[str]) -> None:
    typer.echo(f"{kind}: {len(names)}")
    for name in names[:_MAX_LISTED]:
        typer.echo(f"  {name}")
    if len(names) > _MAX_LISTED:
        typer.echo(f"  and {len(names) - _MAX_LISTED} more")
