"""`d2r promote`, `rollback`, `release`, `models` and `history`: registered versions and the moves of the aliases."""

from typing import TYPE_CHECKING, Annotated

import typer

from d2r_core.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from tasks.config.paths import Paths
    from tasks.config.settings import Settings

Version = Annotated[int, typer.Argument(min=1, help="a version of the registered model; `d2r models` lists them")]
Reason = Annotated[str, typer.Option("--reason", help="why, in a sentence; it goes into the history")]


def promote(
    version: Version,
    reason: Reason,
    force: Annotated[bool, typer.Option("--force", help="even if the gate refuses it or it is on hold")] = False,
    to: Annotated[str | None, typer.Option("--to", help="copy it to this registered model, champion there")] = None,
    server: Annotated[str | None, typer.Option("--server", help="of --to: the address of another MLflow")] = None,
) -> None:
    """Make a version the champion, here or in another model."""
    from tasks.registry import history, moves, transfer

    settings, paths = project()
    who = history.local_user()
    if to or server:
        name = to or settings.promote.model_name
        copy = transfer.promote(settings, paths, version, name=name, server=server, who=who, reason=reason, force=force)
        typer.echo(f"{settings.promote.model_name} version {version} is @champion of {name} as version {copy}.")
        return
    moved = moves.promote(settings, paths, version, who=who, command="promote", reason=reason, force=force)
    typer.echo(f"{settings.promote.model_name} version {version} is @champion{'' if moved else ' already'}.")


def rollback(
    reason: Reason,
    to: Annotated[int | None, typer.Option("--to", min=1, help="the version; by default the champion before")] = None,
) -> None:
    """Return to an earlier champion; puts the present one on hold."""
    from tasks.registry import history, moves

    settings, paths = project()
    result = moves.rollback(settings, paths, who=history.local_user(), reason=reason, to=to)
    if result.left is None:
        typer.echo(f"{settings.promote.model_name} version {result.champion} is @champion already.")
        return
    typer.echo(f"{settings.promote.model_name} version {result.champion} is @champion again.")
    typer.echo(f"No automatic run promotes version {result.left} until `d2r release {result.left}`.")


def release(version: Version) -> None:
    """End the hold of a version: automatic runs may promote it again."""
    from tasks.registry import history, moves

    settings, paths = project()
    released = moves.release(settings, paths, version, who=history.local_user())
    typer.echo(f"{settings.promote.model_name} version {version} {'is released' if released else 'is not on hold'}.")


def models() -> None:
    """List the versions: aliases, gate, approval, holds, accuracies."""
    from datetime import datetime

    from rich.table import Table

    from tasks.registry import status
    from tasks.registry.decision import Approval

    settings, paths = project()
    versions = status.all_versions(settings, paths)
    if not versions:
        typer.echo("There are no versions yet: `d2r run` registers one.")
        return
    version_of = status.aliases(settings, paths)
    table = Table("version", "aliases", "gate", "on hold", "clean", "worst case", "created")
    for version in versions:
        tags, number, approval = version.tags, int(version.version), Approval.of(version)
        table.add_row(
            str(number),
            " ".join(sorted(f"@{alias}" for alias, other in version_of.items() if other == number)),
            tags.get("gate", "not judged") + (f", {approval.state}" if approval else ""),
            _hold(version, versions),
            *(f"{float(tags[key]):.1%}" if key in tags else "" for key in ("clean_accuracy", "robust_accuracy")),
            f"{datetime.fromtimestamp(version.creation_timestamp / 1000):%Y-%m-%d %H:%M}",
        )
    print_table(table)


def _hold(version: "ModelVersion", versions: "list[ModelVersion]") -> str:
    """The hold that binds a version: its own, or that of another version with the same weights; empty without one."""
    import json

    weights = version.tags.get("weights_sha256")
    for other in (version, *versions):
        if "hold" in other.tags and (other is version or (weights and other.tags.get("weights_sha256") == weights)):
            reason = str(json.loads(other.tags["hold"])["reason"])
            return reason if other is version else f"with version {other.version}: {reason}"
    return ""


def history() -> None:
    """List every move of @champion and @challenger, the newest first."""
    from rich.table import Table

    from tasks.registry import status

    settings, paths = project()
    entries = status.read_history(settings, paths, alias=None)
    if not entries:
        typer.echo("No alias has moved yet: `d2r run` registers a version.")
        return
    table = Table("time (UTC)", "alias", "from", "to", "by", "command", "reason", "evidence", "MLflow run")
    for entry in reversed(entries):
        move = entry.move
        outcome = "" if entry.outcome == "completed" else f" ({entry.outcome or 'interrupted'})"
        table.add_row(
            move.time[:19].replace("T", " "),
            f"@{move.alias}",
            str(move.from_version or "none"),
            str(move.to_version),
            move.who,
            f"{move.command}{' --force' if move.forced else ''}{outcome}",
            move.reason,
            move.evidence,
            move.run_id or "",
        )
    print_table(table)


def print_table(table: object) -> None:
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
