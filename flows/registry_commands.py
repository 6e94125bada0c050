"""`d2r promote`, `rollback`, `release`, `models` and `history`: the registered versions and the moves of @champion."""

from typing import TYPE_CHECKING, Annotated

import typer

from d2r_core.errors import UserError

if TYPE_CHECKING:
    from tasks.config.paths import Paths
    from tasks.config.settings import Settings

_Version = Annotated[int, typer.Argument(min=1, help="a version of the registered model; `d2r models` lists them")]
_Reason = Annotated[str, typer.Option("--reason", help="why, in a sentence; it goes into the history")]


def promote(
    version: _Version,
    reason: _Reason,
    force: Annotated[bool, typer.Option("--force", help="even if the gate refuses it or it is on hold")] = False,
    to: Annotated[str | None, typer.Option("--to", help="copy it to this registered model, champion there")] = None,
    server: Annotated[str | None, typer.Option("--server", help="of --to: the address of another MLflow")] = None,
) -> None:
    """Make a version the champion, here or in another model."""
    from tasks.registry import moves, transfer

    settings, paths = project()
    if to or server:
        name, who = to or settings.promote.model_name, moves.local_user()
        copy = transfer.promote(settings, paths, version, name=name, server=server, who=who, reason=reason, force=force)
        typer.echo(f"{settings.promote.model_name} version {version} is @champion of {name} as version {copy}.")
        return
    moved = moves.promote(
        settings, paths, version, who=moves.local_user(), command="promote", reason=reason, force=force
    )
    typer.echo(f"{settings.promote.model_name} version {version} is @champion{'' if moved else ' already'}.")


def rollback(
    reason: _Reason,
    to: Annotated[int | None, typer.Option("--to", min=1, help="the version; by default the champion before")] = None,
) -> None:
    """Return to an earlier champion; puts the present one on hold."""
    from tasks.registry import moves

    settings, paths = project()
    result = moves.rollback(settings, paths, who=moves.local_user(), reason=reason, to=to)
    if result.left is None:
        typer.echo(f"{settings.promote.model_name} version {result.champion} is @champion already.")
        return
    typer.echo(f"{settings.promote.model_name} version {result.champion} is @champion again.")
    typer.echo(f"No automatic run promotes version {result.left} until `d2r release {result.left}`.")


def release(version: _Version) -> None:
    """End the hold of a version: automatic runs may promote it again."""
    from tasks.registry import moves

    settings, paths = project()
    released = moves.release(settings, paths, version, who=moves.local_user())
    typer.echo(f"{settings.promote.model_name} version {version} {'is released' if released else 'is not on hold'}.")


def models() -> None:
    """List the versions: aliases, gate, holds, accuracies."""
    import json
    from datetime import datetime

    from rich.table import Table

    from tasks.registry import status

    settings, paths = project()
    versions = status.all_versions(settings, paths)
    if not versions:
        typer.echo("There are no versions yet: `d2r run` registers one.")
        return
    version_of = status.aliases(settings, paths)
    table = Table("version", "aliases", "gate", "on hold", "clean", "worst case", "created")
    for version in versions:
        tags, number = version.tags, int(version.version)
        table.add_row(
            str(number),
            " ".join(sorted(f"@{alias}" for alias, other in version_of.items() if other == number)),
            tags.get("gate", "not judged"),
            json.loads(tags["hold"])["reason"] if "hold" in tags else "",
            *(f"{float(tags[key]):.1%}" if key in tags else "" for key in ("clean_accuracy", "robust_accuracy")),
            f"{datetime.fromtimestamp(version.creation_timestamp / 1000):%Y-%m-%d %H:%M}",
        )
    _print(table)


def history() -> None:
    """List every move of @champion, the newest first."""
    from rich.table import Table

    from tasks.registry import moves, status

    settings, paths = project()
    entries = moves.read_history(settings, paths) if status.store_exists(settings, paths) else []
    if not entries:
        typer.echo("@champion has not moved yet.")
        return
    table = Table("time (UTC)", "from", "to", "by", "command", "reason", "evidence", "MLflow run")
    for entry in reversed(entries):
        move = entry.move
        outcome = "" if entry.outcome == "completed" else f" ({entry.outcome or 'interrupted'})"
        table.add_row(
            move.time[:19].replace("T", " "),
            str(move.from_version or "none"),
            str(move.to_version),
            move.who,
            f"{move.command}{' --force' if move.forced else ''}{outcome}",
            move.reason,
            move.evidence,
            move.run_id or "",
        )
    _print(table)


def _print(table: object) -> None:
    """Print a table; markup in a reason or a name is text."""
    from rich.console import Console

    Console(markup=False).print(table)


def project() -> tuple["Settings", "Paths"]:
    """The settings and paths of the current folder. Raises UserError outside of a project."""
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths

    paths = Paths()
    if not paths.params.exists():
        raise UserError(f"there is no params.yaml in {paths.root.resolve()}: run this in the project's own folder.")
    return settings_file.load(paths.params), paths
