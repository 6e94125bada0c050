"""The wait of a flow for a person, where `promote.approval` is manual.

The flow pauses (`pause_flow_run`) and does not suspend: only a flow run of a deployment can be suspended, and `d2r run`
starts none; and a suspended one would begin anew, with the data and settings of the day of the answer. Prefect fails a
flow whose pause ends without an answer, so the flow answers itself in time.
"""

import time
from contextlib import suppress
from datetime import UTC, datetime
from threading import Event, Thread
from typing import Literal
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger, pause_flow_run
from prefect.client.orchestration import SyncPrefectClient
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY
from pydantic import Field

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.prefect_tasks import promote, record_answer, request_approval
from tasks.registry import approval
from tasks.registry.decision import Approval
from tasks.registry.gate import Verdict
from tasks.registry.moves import MAX_REASON

POLL = 5  # seconds between two looks for an answer
_NOBODY = "nobody"
_GRACE = 600  # seconds for a server that is away when the time is up


class Answer(RunInput):
    """What Prefect's UI asks for."""

    approve: bool = Field(description="Make the version @champion?")
    who: str = Field(min_length=1, max_length=200, description="Your name: it goes into the history.")
    reason: str = Field(min_length=1, max_length=MAX_REASON, description="Why: it goes into the history.")


def promote_if_approved(
    settings: Settings, paths: Paths, version: int, verdict: Verdict
) -> tuple[Verdict, Approval | None]:
    """Wait for a person's answer and promote the version if it is yes. Must be called inside a flow.

    The verdict fails if the promotion is refused (a hold); a rejection and the end of the time leave it as it was.
    """
    verdict, requested = request_approval(settings, paths, version, verdict)
    if requested is None or requested.state != "waiting":
        return verdict, requested
    answer = _pause(settings, paths, version) if settings.promote.approval_minutes else None
    decided = record_answer(settings, paths, version, answer)
    if decided.state == "approved":
        verdict = promote(settings, paths, version, verdict, decided)
    return verdict, decided


def _pause(settings: Settings, paths: Paths, version: int) -> Approval | None:
    """Pause until `d2r approve` or Prefect's UI answers; None if nobody did in time."""
    seconds = 60 * settings.promote.approval_minutes
    get_run_logger().info(f"Waiting for the approval of version {version} in another terminal. Ctrl-C ends the wait.")
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    answered = Event()
    watched = (settings, paths, version, url, UUID(flow_run.id), time.monotonic() + seconds, answered)
    Thread(target=_watch, args=watched, daemon=True).start()
    try:
        answer = pause_flow_run(wait_for_input=Answer, timeout=round(seconds) + _GRACE, poll_interval=POLL)
    finally:
        answered.set()
    if answer.who == _NOBODY:
        return None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    state: Literal["approved", "rejected"] = "approved" if answer.approve else "rejected"
    return Approval(state=state, who=answer.who, reason=answer.reason, time=now)


def _watch(
    settings: Settings, paths: Paths, version: int, url: str, run_id: UUID, deadline: float, answered: Event
) -> None:
    """Resume the flow run with the answer that `d2r approve` recorded, or after the deadline with that of nobody.

    Tries again while a server is away, until the flow is `answered`.
    """
    while not answered.wait(POLL):
        decided = None
        with suppress(UserError):
            decided = approval.read(settings, paths, version)
        if decided is not None and decided.state in ("approved", "rejected"):
            answer = Answer(approve=decided.state == "approved", who=decided.who, reason=decided.reason)
        elif time.monotonic() >= deadline:
            answer = Answer(approve=False, who=_NOBODY, reason="Nobody answered in time.")
        else:
            continue
        with (
            suppress(httpx.HTTPError),
            SyncPrefectClient(
                url, auth_string=PREFECT_API_AUTH_STRING.value(), api_key=PREFECT_API_KEY.value()
            ) as client,
        ):
            client.resume_flow_run(run_id, run_input=answer.model_dump(mode="json"))
