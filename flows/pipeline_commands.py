"""`d2r run`, `stage`, `use` and `status`: the pipeline as a whole, its stages, its parameters and its state."""

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2r_core.errors import UserError

if TYPE_CHECKING:
    from tasks.config.paths import Paths
    from tasks.config.settings import Settings
    from tasks.registry.status import RegistryStatus


def run() -> None:
    """Run the whole pipeline, from the data to the registered model."""
    from tasks.registry import status as registry

    settings, paths = _project()
    # This takes less time than the start of Prefect.
    registered = registry.finished(settings, paths)
    if registered:
        typer.echo("Everything is up to date.")
    else:
        _run_flow()
        registered = registry.registry_status(settings, paths)
    assert registered is not None, "the flow registers the model"
    _print_results(settings, paths, registered)


def stage(name: Annotated[str, typer.Argument(help="prepare, validate, pretrain, train, evaluate or report")]) -> None:
    """Run one stage through DVC, if it is not up to date."""
    from tasks.pipeline import dvc

    _, paths = _project()
    result = dvc.reproduce(name, paths, typer.echo)
    typer.echo(f"stage {name}: {result}")
    outdated = dvc.outdated_inputs(name, paths)
    if outdated:
        typer.echo(
            f"It used earlier results of {', '.join(outdated)}, not up to date with the present files and params.yaml: "
            "`d2r run` runs these first."
        )


def use(
    preset: Annotated[str, typer.Argument(help="a file in presets/, without .yaml")],
    force: Annotated[bool, typer.Option("--force", help="overwrite a params.yaml with changes of your own")] = False,
) -> None:
    """Replace params.yaml by a preset."""
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
    unchanged = {path.read_bytes() for path in presets.values()}
    if paths.params.exists() and paths.params.read_bytes() not in unchanged and not force:
        raise UserError(f"params.yaml has changes of your own. `d2r use {preset} --force` overwrites them.")
    files.write_text(paths.params, presets[preset].read_text(encoding="utf-8"))
    typer.echo(f"params.yaml is now presets/{preset}.yaml. `d2r run` runs it.")


def status() -> None:
    """Show which stages are up to date and which version is champion."""
    from concurrent.futures import ThreadPoolExecutor

    from tasks.pipeline import dvc
    from tasks.registry.status import aliases, import_mlflow, registry_status
    from tasks.tracking.uri import public_uri

    settings, paths = _project()
    with ThreadPoolExecutor() as pool:
        stage_states, cache_folder = pool.submit(_stage_states, paths), pool.submit(dvc.cache_folder, paths)
        import_mlflow(settings, paths)
    try:
        for name, state in stage_states.result():
            typer.echo(f"{name:<12}{state}")
    except dvc.BusyError as error:
        typer.echo(f"A run is in progress.\n{error}")
    typer.echo()
    version_of = aliases(settings, paths)
    for alias in ("champion", "challenger"):
        version = version_of.get(alias)
        typer.echo(f"{alias:<12}{f'{settings.promote.model_name} version {version}' if version else 'none yet'}")
    _print_decision(paths)
    registered = registry_status(settings, paths) if settings.promote.approval == "manual" else None
    if registered and registered.approval:
        typer.echo(f"{'approval':<12}{registered.approval.sentence(registered.version)}")
    typer.echo()
    for label, path in (("report", paths.report), ("decision", paths.decision_page), ("model card", paths.model_card)):
        typer.echo(f"{label:<12}{path if path.exists() else 'not written yet'}")
    typer.echo(f"{'MLflow':<12}{public_uri(settings)}")
    typer.echo(f"{'DVC cache':<12}{cache_folder.result()}")


def _project() -> tuple["Settings", "Paths"]:
    """The settings and paths of the current folder. Raises UserError outside of a project."""
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.pipeline import dvc

    paths = Paths()
    dvc.order(paths)
    return settings_file.load(paths.params), paths


def _run_flow() -> None:
    """Run the flow in its own session, so that Ctrl-C does not reach Prefect's temporary server.

    The flow needs the server to record its final state. Without it, the flow would wait for minutes and remain in the
    state "running" for ever.
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


def _print_results(settings: "Settings", paths: "Paths", registered: "RegistryStatus") -> None:
    """Print the figures, the paths of the reports, and the state of the model in the registry."""
    import rich
    from rich.table import Table

    from flows import summary
    from tasks.config.credentials import without_credentials
    from tasks.evaluation.report_schema import RobustnessReport

    robustness = RobustnessReport.read(paths.robustness)
    table = Table(*summary.HEADER, title=f"Accuracy under attack ({robustness.norm})")
    for row in summary.rows(robustness):
        table.add_row(*row)
    rich.print(table)
    typer.echo(f"self-checks {summary.self_checks(robustness)}")
    aliases = " ".join(f"@{alias}" for alias in registered.aliases)
    typer.echo(f"report      {paths.report}")
    typer.echo(f"model card  {paths.model_card}")
    typer.echo(f"model       {settings.promote.model_name} version {registered.version} {aliases}")
    typer.echo(f"gate        {registered.gate}")
    for reason in registered.reasons:
        typer.echo(f"            {reason}")
    if registered.approval:
        typer.echo(f"approval    {registered.approval.sentence(registered.version)}")
    typer.echo(f"MLflow      {summary.open_mlflow(settings)}")
    server = without_credentials(os.environ.get("PREFECT_API_URL", "")).removesuffix("/api")
    typer.echo(f"Prefect     {server or 'prefect server start'}")


def _print_decision(paths: "Paths") -> None:
    """Print what the gate decided last, and a line for each of its rules, with figures and interval."""
    from tasks.registry.decision import Decision

    if not paths.decision.is_file():
        return
    decision = Decision.read(paths.decision)
    typer.echo(f"{'gate':<12}version {decision.version} {'passed' if decision.passed else 'failed'}")
    for rule in decision.rules:
        typer.echo(f"{'':<12}{rule.verdict:<10} {rule.name}: {rule.reason}")


def _stage_states(paths: "Paths") -> list[tuple[str, str]]:
    """Every stage with its state, in words."""
    from tasks.pipeline import dvc

    changed, upstream, recorded = dvc.status(paths), dvc.upstream(paths), dvc.recorded(paths)
    states: list[tuple[str, str]] = []
    stale: list[str] = []
    for name in dvc.order(paths):
        stale_inputs = [other for other in stale if other in upstream[name]]
        if name not in changed and not stale_inputs:
            states.append((name, "up to date"))
            continue
        stale.append(name)
        if name not in recorded:
            states.append((name, "has not run"))
        elif name in changed:
            states.append((name, f"outdated: {', '.join(_reasons(changed[name]))}"))
        else:
            states.append((name, f"waits for {', '.join(stale_inputs)}"))
    return states


def _reasons(entries: list[Any]) -> Iterator[str]:
    """The changes in `dvc status --json`: `{"changed deps": {path: change, "params.yaml": {key: change}}}` or text."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        for changes in entry.values():
            for path, change in changes.items():
                if isinstance(change, dict):
                    yield from (f"{key} {key_change}" for key, key_change in change.items())
                else:
                    yield f"{path} {change}"
