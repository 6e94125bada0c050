"""The Prefect tasks of the flows, one for each step that can fail on its own, and their retry conditions.

DVC decides what is up to date, so Prefect's own caching is disabled. Only failures that a retry can fix are retried:
another running DVC process, and a tracking server that is temporarily unavailable.
"""

from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.pipeline import dvc
from tasks.registry import approval, champion_comparison, history, moves, versions
from tasks.registry.decision import Approval
from tasks.registry.gate import Verdict, judge
from tasks.registry.provenance import PrefectRun
from tasks.tracking.errors import UnavailableError


def is_busy(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another DVC process was running. An invalid parameter or a failed training would only fail again."""
    return isinstance(state.data, dvc.BusyError)


def is_unavailable(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the tracking server was unavailable."""
    return isinstance(state.data, UnavailableError)


# The delays are longer than another `dvc status` or `dvc checkout`, but do not wait for another training.
@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=is_busy)
def reproduce(stage: str) -> State[Any]:
    """Bring one stage up to date; its output lines go to the log of the task."""
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
    run = PrefectRun(id=flow_run.id, name=flow_run.name or "") if flow_run.id else None
    version = versions.register(settings, paths, run)
    print(f"{settings.promote.model_name} version {version} is @challenger")
    return version


@_registry_task
def gate(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Apply the gate to a version, with the limits in the section `promote`."""
    verdict = judge(settings, paths, version)
    print(
        f"The gate {'lets' if verdict.passed else 'does not let'} version {version} pass: {' '.join(verdict.reasons)}"
    )
    return verdict


@_registry_task
def promote(
    settings: Settings, paths: Paths, version: int, verdict: Verdict, answer: Approval | None = None
) -> Verdict:
    """Move @champion to a version that passed the gate; returns a failed verdict if that is refused (a hold).

    Args:
        answer: the approval, where a person was asked; it goes into the history.
    """
    name = settings.promote.model_name
    try:
        if answer is None:
            moves.promote(settings, paths, version, who=_who(), command="retrain", reason="It passed the gate.")
        else:
            approval.approve(settings, paths, version, who=answer.who, reason=answer.reason)
    except moves.RefusedError as error:
        print(f"{name} version {version} is not promoted. {error}")
        return verdict._replace(passed=False, reasons=(str(error),))
    print(f"{name} version {version} is @champion")
    return verdict


@_registry_task
def request_approval(
    settings: Settings, paths: Paths, version: int, verdict: Verdict
) -> tuple[Verdict, Approval | None]:
    """Record that a version waits for a person, and how to answer.

    A failed verdict if the version is on hold; no approval if it is champion already.
    """
    try:
        requested = approval.request(settings, paths, version, who=_who())
    except moves.RefusedError as error:
        print(f"{settings.promote.model_name} version {version} is not promoted. {error}")
        return verdict._replace(passed=False, reasons=(str(error),)), None
    if requested is not None:
        print(requested.sentence(version))
    return verdict, requested


@_registry_task
def record_answer(settings: Settings, paths: Paths, version: int, answer: Approval | None) -> Approval:
    """What was decided: by `d2r approve`, else by the answer that Prefect got; None: it got none in time."""
    decided = approval.read(settings, paths, version)
    if decided is None or decided.state == "waiting":
        if answer is None:
            decided = approval.expire(settings, paths, version)
        elif answer.state == "rejected":
            decided = approval.reject(settings, paths, version, who=answer.who, reason=answer.reason)
        else:
            decided = answer
    print(decided.sentence(version))
    return decided


def _who() -> str:
    return f"{history.local_user()}, Prefect flow run {flow_run.name or 'none'}"
