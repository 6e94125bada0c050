"""Approval by a person of a version that passed the gate.

The answer is a tag of the version, so that it can be given wherever MLflow is reached, whether a flow waits for it, has
ended, or died with its machine. A rejection binds this version alone, until an approval overrules it.
"""

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import gate, history, moves
from tasks.registry.decision import Approval
from tasks.registry.lock import registry_lock
from tasks.registry.versions import connect, resolve_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def request(settings: Settings, paths: Paths, version: int, *, who: str) -> Approval | None:
    """Record that the version waits for an answer; None if it is champion already.

    A version that was rejected keeps its rejection, which is returned.

    Raises:
        RefusedError: the version did not pass the gate or is on hold, so there is nothing to approve.
    """
    name = settings.promote.model_name
    with connect(settings, paths) as client, registry_lock(client, name):
        registered = moves.get_version(client, name, version)
        if resolve_alias(client, name, history.ALIAS) == version:
            return None
        moves.refuse(client, registered)
        before = Approval.of(registered)
        if before is not None and before.state == "rejected":
            return before
        until = datetime.now(UTC) + timedelta(minutes=settings.promote.approval_minutes)
        waiting = Approval(state="waiting", who=who, time=until.isoformat(timespec="seconds"))
        return _record(client, registered, waiting)


def read(settings: Settings, paths: Paths, version: int) -> Approval | None:
    """What was decided about the version; None if nobody was asked."""
    with connect(settings, paths) as client:
        return Approval.of(moves.get_version(client, settings.promote.model_name, version))


def approve(settings: Settings, paths: Paths, version: int, *, who: str, reason: str) -> bool:
    """Make a version that passed the gate champion, on a person's word; False if it was champion already.

    If the champion is another one by now than the gate compared with, the gate judges again.

    Raises:
        RefusedError: the version did not pass the gate, or is on hold.
        UserError: there is no such version, its files are not the ones that were registered, the reason is too long, or
            the gate would have to attack the present champion and the data or settings of the version are not here.
    """
    name = settings.promote.model_name
    with connect(settings, paths) as client:
        registered = moves.get_version(client, name, version)
        champion = resolve_alias(client, name, history.ALIAS)
    decision = json.loads(registered.tags.get("decision", "{}"))
    if champion != version and decision.get("passed") and decision["champion"] != champion:
        gate.judge(settings, paths, version)
    moved = moves.promote(settings, paths, version, who=who, command=history.APPROVE, reason=reason)
    before = Approval.of(registered)
    if moved or (before is not None and before.state == "waiting"):
        with connect(settings, paths) as client, registry_lock(client, name):
            _record(client, registered, Approval(state="approved", who=who, reason=reason, time=_now()))
    return moved


def reject(settings: Settings, paths: Paths, version: int, *, who: str, reason: str) -> Approval:
    """Record that a person does not want the version as champion; no automatic run asks again.

    Raises:
        UserError: there is no such version, it is champion, or the reason is too long.
    """
    name = settings.promote.model_name
    moves.check_reason(reason)
    with connect(settings, paths) as client, registry_lock(client, name):
        registered = moves.get_version(client, name, version)
        if resolve_alias(client, name, history.ALIAS) == version:
            raise UserError(
                f"{name} version {version} is @champion already. `d2r rollback` goes back to the one before."
            )
        return _record(client, registered, Approval(state="rejected", who=who, reason=reason, time=_now()))


def expire(settings: Settings, paths: Paths, version: int) -> Approval:
    """Record that nobody answered in time, unless somebody did; returns what is recorded then."""
    name = settings.promote.model_name
    with connect(settings, paths) as client, registry_lock(client, name):
        registered = moves.get_version(client, name, version)
        before = Approval.of(registered)
        if before is not None and before.state in ("approved", "rejected"):
            return before
        who = "" if before is None else before.who
        return _record(client, registered, Approval(state="expired", who=who, time=_now()))


def _record(client: "MlflowClient", version: "ModelVersion", approval: Approval) -> Approval:
    client.set_model_version_tag(version.name, str(version.version), "approval", approval.model_dump_json())
    return approval


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
