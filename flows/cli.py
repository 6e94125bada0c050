"""`d2r`: the face to the user. Only what prints the help is imported at the top, so that it appears at once."""

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2r_core.errors import UserError
from flows import data_commands, evaluate_command

if TYPE_CHECKING:
    from tasks.config.paths import Paths
    from tasks.config.settings import Settings
    from tasks.registry.status import RegistryStatus

app = typer.Typer(
    help="Trains image classifiers that stay right under adversarial attack, from data to champion.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_commands.app, name="data")
app.command()(evaluate_command.evaluate)


@app.command()
def run() -> None:
    """Run the whole chain, from the data to the registered model."""
    from tasks.pipeline import dvc

    settings, paths = _project()
    registered = None
    if not dvc.status(paths):
        from tasks.registry.status import registry_status

        registered = registry_status(settings, paths)
    # Prefect takes longer to start than all the questions above.
    if registered and (registered.settled or "champion" in registered.aliases):
        typer.echo("Everything is up to date.")
    else:
        _retrain()
        from tasks.registry.status import registry_status

        registered = registry_status(settings, paths)
    assert registered is not None, "the flow has registered it"
    _conclude(settings, paths, registered)


@app.command()
def stage(name: Annotated[str, typer.Argument(help="prepare, validate, pretrain, train, evaluate or report")]) -> None:
    """Run one stage through DVC, if it is not up to date."""
    from tasks.pipeline import dvc

    _, paths = _project()
    outcome = dvc.reproduce(name, paths, typer.echo)
    typer.echo(f"stage {name}: {outcome}")


@app.command()
def use(
    preset: Annotated[str, typer.Argument(help="a file of presets/, without .yaml")],
    force: Annotated[bool, typer.Option("--force", help="overwrite a params.yaml with changes of your own")] = False,
) -> None:
    """Put a preset in place as params.yaml."""
    from d2r_core import files
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths

    paths = Paths()
    presets = {path.stem: path for path in sorted((paths.root / "presets").glob("*.yaml"))}
    if not presets:
        raise UserError(f"there is no presets/ in {paths.root.resolve()}: run this in the project's own folder.")
    if preset not in presets:
        close = difflib.get_close_matches(preset, presets, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"there is no preset {preset!r}.{hint} The presets are: {', '.join(presets)}.")
    settings_file.load(presets[preset])
    known = {path.read_bytes() for path in presets.values()}
    if paths.params.exists() and paths.params.read_bytes() not in known and not force:
        raise UserError(f"params.yaml holds changes of your own. `d2r use {preset} --force` overwrites them.")
    files.write_text(paths.params, presets[preset].read_text(encoding="utf-8"))
    typer.echo(f"params.yaml is now presets/{preset}.yaml. `d2r run` runs it.")


@app.command()
def status() -> None:
    """Say what is up to date and which version is champion."""
    from tasks.pipeline import dvc
    from tasks.registry.status import aliases
    from tasks.tracking.uri import tracking_uri

    settings, paths = _project()
    try:
        for name, state in _stage_states(paths):
            typer.echo(f"{name:<12}{state}")
    except dvc.BusyError as error:
        typer.echo(f"A run is in progress.\n{error}")
    typer.echo()
    held = aliases(settings, paths)
    for alias in ("champion", "challenger"):
        version = held.get(alias)
        typer.echo(f"{alias:<12}{f'{settings.promote.model_name} version {version}' if version else 'none yet'}")
    typer.echo()
    for what, path in (("report", paths.report), ("model card", paths.model_card)):
        typer.echo(f"{what:<12}{path if path.exists() else 'not made yet'}")
    typer.echo(f"{'MLflow':<12}{tracking_uri(settings)}")
    typer.echo(f"{'DVC cache':<12}{dvc.cache(paths)}")


def main() -> None:
    """The console script: an error is one message and exit code 1, an interruption exit code 130."""
    # Their default action would leave the stage running.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:
            typer.echo("interrupted", err=True)
        raise


def _project() -> tuple["Settings", "Paths"]:
    """The settings and the paths of the current folder. Raises UserError outside a project."""
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.pipeline import dvc

    paths = Paths()
    dvc.order(paths)
    return settings_file.load(paths.params), paths


def _retrain() -> None:
    """Run the flow in a session of its own, where Ctrl-C does not reach the temporary server of Prefect's.

    The flow needs that server to record its own end; without, it would wait for minutes and look running for ever.
    """
    flow = subprocess.Popen([sys.executable, "-m", "flows.retrain"], start_new_session=True)
    interrupted = False
    while True:
        try:
            code = flow.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            flow.send_signal(signal.SIGINT)
    if interrupted or code:
        raise typer.Exit(130 if interrupted else 1)


def _conclude(settings: "Settings", paths: "Paths", registered: "RegistryStatus") -> None:
    """Print the figures, where to look further, and what became of the model."""
    import rich
    from rich.table import Table

    from flows import summary
    from tasks.evaluation.report_schema import RobustnessReport

    robustness = RobustnessReport.read(paths.robustness)
    table = Table(*summary.HEADER, title=f"Accuracy under attack ({robustness.norm})")
    for row in summary.rows(robustness):
        table.add_row(*row)
    rich.print(table)
    typer.echo(f"self-checks {summary.self_checks(robustness)}")
    held = " ".join(f"@{alias}" for alias in registered.aliases)
    typer.echo(f"report      {paths.report}")
    typer.echo(f"model card  {paths.model_card}")
    typer.echo(f"model       {settings.promote.model_name} version {registered.version} {held}")
    typer.echo(f"gate        {registered.gate}")
    for reason in registered.reasons:
        typer.echo(f"            {reason}")
    typer.echo(f"MLflow      {summary.open_mlflow(settings)}")
    server = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    typer.echo(f"Prefect     {server or 'prefect server start'}")


def _stage_states(paths: "Paths") -> Iterator[tuple[str, str]]:
    """Every stage with what DVC says of it."""
    from tasks.pipeline import dvc

    changed, upstream, recorded = dvc.status(paths), dvc.upstream(paths), dvc.recorded(paths)
    stale: list[str] = []
    for name in dvc.order(paths):
        waits = [other for other in stale if other in upstream[name]]
        if name not in changed and not waits:
            yield name, "up to date"
            continue
        stale.append(name)
        if name not in recorded:
            yield name, "has not run"
        elif name in changed:
            yield name, f"to be run: {', '.join(_reasons(changed[name]))}"
        else:
            yield name, f"waits for {', '.join(waits)}"


def _reasons(entries: list[Any]) -> Iterator[str]:
    """What changed, from `dvc status --json`: `{"changed deps": {path: how, "params.yaml": {key: how}}}` or words."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        for changes in entry.values():
            for path, how in changes.items():
                yield from (
                    (f"{key} {what}" for key, what in how.items()) if isinstance(how, dict) else [f"{path} {how}"]
                )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
