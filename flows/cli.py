"""The command `d2r`. Modules are imported inside the functions that need them, so that the help appears at once."""

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from d2r_core.errors import UserError
from flows import (
    approve_command,
    compare_command,
    data_commands,
    evaluate_command,
    gc_command,
    lineage_command,
    pipeline_commands,
    predict_command,
    registry_commands,
    reproduce_command,
)

app = typer.Typer(
    help="Trains image classifiers that remain accurate under adversarial attack, from data to champion.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_commands.app, name="data")
for command in (
    pipeline_commands.run,
    pipeline_commands.stage,
    pipeline_commands.use,
    pipeline_commands.status,
    evaluate_command.evaluate,
    predict_command.predict,
    registry_commands.promote,
    approve_command.approve,
    registry_commands.rollback,
    registry_commands.release,
    registry_commands.models,
    registry_commands.history,
    compare_command.compare,
    gc_command.gc,
    lineage_command.lineage,
    reproduce_command.reproduce,
):
    app.command()(command)


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"d2r {version('d2r')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What `d2r` takes before a command."""


def main() -> None:
    """The console script. Exit code 1: an error, printed as one message; 130: interrupted."""
    # The default action of these signals would leave the stage running.
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


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
