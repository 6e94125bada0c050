"""The end of a retraining: register what was evaluated, gate it, and make it champion if it passes.

Side effects, so Prefect tasks and never DVC stages: a cached stage would skip them.
"""

from typing import Any, Literal, NamedTuple

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import versions
from tasks.registry.versions import Verdict
from tasks.tracking.runs import UnavailableError


class Outcome(NamedTuple):
    """A registered version, the alias it ended with, and why."""

    version: int
    alias: Literal["champion", "challenger"]
    verdict: Verdict


def promotion(settings: Settings, paths: Paths) -> Outcome:
    """Register the evaluated model as @challenger; gate it; move @champion to it if it passes.

    To be called inside a flow. A refusal by the gate is an outcome, not an error.
    """
    version = register(settings, paths)
    verdict = gate(settings, paths, version)
    if verdict.passed:
        promote(settings, paths, version)
    alias: Literal["champion", "challenger"] = (
        "champion" if verdict.passed or versions.champion(settings, paths) == version else "challenger"
    )
    return Outcome(version, alias, verdict)


def may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Only a server that was away for a moment is worth another try."""
    return isinstance(state.result(raise_on_failure=False), UnavailableError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=may_pass, log_prints=True)
def register(settings: Settings, paths: Paths) -> int:
    version = versions.register(settings, paths)
    print(f"{settings.promote.model_name} version {version} is @challenger")
    return version


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=may_pass, log_prints=True)
def gate(settings: Settings, paths: Paths, version: int) -> Verdict:
    verdict = versions.gate(settings, paths, version)
    print(
        f"The gate {'lets' if verdict.passed else 'does not let'} version {version} pass: {' '.join(verdict.reasons)}"
    )
    return verdict


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=may_pass, log_prints=True)
def promote(settings: Settings, paths: Paths, version: int) -> None:
    versions.promote(settings, paths, version)
    print(f"{settings.promote.model_name} version {version} is @champion")
