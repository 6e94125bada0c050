"""`d2r approve`: a person's answer about a version that passed the gate."""

from typing import Annotated

import typer

from flows.registry_commands import Reason, Version, project


def approve(
    version: Version,
    reason: Reason,
    reject: Annotated[bool, typer.Option("--reject", help="the champion stays, and no run asks again")] = False,
) -> None:
    """Make a version that passed the gate champion, or reject it. A flow that waits for the answer goes on."""
    from tasks.registry import approval, history

    settings, paths = project()
    who, title = history.local_user(), f"{settings.promote.model_name} version {version}"
    before = approval.read(settings, paths, version)
    if reject:
        approval.reject(settings, paths, version, who=who, reason=reason)
        typer.echo(f"{title} is rejected. `d2r approve {version} --reason TEXT` overrules it.")
    else:
        moved = approval.approve(settings, paths, version, who=who, reason=reason)
        typer.echo(f"{title} is @champion{'' if moved else ' already'}.")
    if before is not None and before.state == "waiting":
        typer.echo(f"If it still runs, the flow that waits goes on within seconds ({before.who}).")
