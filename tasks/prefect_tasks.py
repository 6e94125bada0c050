"""What the flows are composed of: one Prefect task for each step that can fail by itself, and what decides a retry.

DVC decides what is up to date, so Prefect's own caching is off. Only what a retry can mend is tried again: another DVC
process at work, and a tracking server that was away for a moment.
"""

from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.pipeline import dvc
from tasks.registry import champion_comparison, versions
from tasks.registry.gate import Verdict, judge
from tasks.tracking.errors import UnavailableError


def is_busy(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another DVC process was at work: a wrong parameter or a failed training would only fail again."""
    return isinstance(state.data, dvc.BusyError)


def is_unavailable(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the tracking server did not answer."""
    return isinstance(state.result(raise_on_failure=False), UnavailableError)


# The delays outlast a `dvc status` or `dvc checkout` of somebody else; another training is not waited for.
@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=is_busy)
def reproduce(stage: str) -> State[Any]:
    """Bring one stage up to date; its output goes line by line to the task's log."""
    return Completed(message=dvc.reproduce(stage, Paths(), get_run_logger().info))


_registry_task = task(
    cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=is_unavailable, log_prints=True
)


@_registry_task
def compare(settings: Settings, paths: Paths) -> None:
    """Compare the evaluated model with the champion, for the report."""
    print(champion_comparison.compare(settings, paths))


@_registry_task
def register(settings: Settings, paths: Paths) -> int:
    """Register the evaluated model as @challenger; returns its version."""
    version = versions.register(settings, paths)
    print(f"{settings.promote.model_name} version {version} is @challenger")
    return version


@_registry_task
def gate(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Judge a version by the rules of `promote`."""
    verdict = judge(settings, paths, version)
    print(
        f"The gate {'lets' if verdict.passed else 'does not let'} version {version} pass: {' '.join(verdict.reasons)}"
    )
    return verdict


@_registry_task
def promote(settings: Settings, paths: Paths, version: int) -> None:
    """Move @champion to a version."""
    versions.promote(settings, paths, version)
    print(f"{settings.promote.model_name} version {version} is @champion")
