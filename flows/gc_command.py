"""`d2r gc`: what neither an alias, the history, a recent run nor DVC refers to."""

from typing import Annotated

import typer


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete it; without this it is only listed")] = False,
    keep_days: Annotated[float, typer.Option("--keep-days", min=0, help="what is younger stays")] = 30,
) -> None:
    """List, or with --delete delete, what nothing refers to."""
    import tempfile
    from pathlib import Path

    from flows.registry_commands import project
    from tasks.pipeline import cache_cleanup, old_states
    from tasks.registry import unused
    from tasks.tracking.uri import tracking_uri

    settings, paths = project()
    with tempfile.TemporaryDirectory() as folder:
        entries = unused.collect(settings, paths, keep_days, Path(folder), delete=delete)
        states = old_states.collect(paths, keep_days, delete=delete)
        dvc_lines = cache_cleanup.collect(paths, entries.dvc_locks, delete=delete)
    rows = [
        *((f"{version.name} version {version.version}", None) for version in entries.versions),
        *((f"logged model {model.model_id}", size) for model, size in entries.models),
        *((f"run {run.info.run_id} ({run.info.run_name})", size) for run, size in entries.runs),
        *((f"training state {path}", size) for path, size in states),
    ]
    for name, size in rows:
        typer.echo(f"{'deleted' if delete else 'unused'}  {name}{'' if size is None else f'  {size:,} bytes'}")
    for line in dvc_lines:
        typer.echo(f"dvc gc: {line}")
    if not delete:
        typer.echo("Nothing was deleted: `d2r gc --delete` deletes this.")
    elif entries.models or entries.runs:
        uri = tracking_uri(settings)
        where = f"--backend-store-uri {uri}" if uri.startswith("sqlite:///") else "on the server"
        typer.echo(f"MLflow keeps the files of what is deleted until `mlflow gc {where}` removes them.")
