"""Moves of @champion: promotion, rollback, and the hold that keeps a version from being promoted again by itself.

A hold is a tag of the version and binds its weights: other versions of the same weights are on hold as well.
"""

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import history, recorded_examples, signing
from tasks.registry.decision import Approval
from tasks.registry.history import Move
from tasks.registry.lock import registry_lock
from tasks.registry.versions import connect, find_version, resolve_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MAX_REASON = 500  # characters: MLflow limits the length of a tag
_MAX_EVIDENCE = 1000


class RefusedError(UserError):
    """A version that the gate did not pass or that is on hold; only a forced promotion takes it."""


class Rollback(NamedTuple):
    """A finished rollback; without `left`, the version was champion already."""

    left: int | None
    champion: int


def promote(
    settings: Settings, paths: Paths, version: int, *, who: str, command: str, reason: str, force: bool = False
) -> bool:
    """Move @champion to `version`; False if it was champion already, which records nothing.

    Before, the version is loaded as a client does and predicts its recorded examples. A forced promotion takes a
    version whatever the gate says, is recorded as forced, and ends a hold.

    Raises:
        RefusedError: the gate did not pass the version, it is on hold, or a person rejected it, which an approval
            overrules; not with `force`.
        UserError: there is no such version, its files are not the ones that were registered, it does not answer as it
            did then, or the reason is too long.
    """
    name = settings.promote.model_name
    with _moving(settings, paths, reason) as client:
        registered = get_version(client, name, version)
        history.repair(client, name)
        if resolve_alias(client, name, history.ALIAS) == version:
            return False
        if not force:
            refuse(client, registered)
            if command != history.APPROVE:
                _refuse_rejected(registered)
        recorded_examples.predict(registered, signing.trusted_key(settings, paths))
        move = _move(registered, who=who, command=command, reason=reason, forced=force)
        history.record_and_move(client, name, move)
        if force:
            _release(client, registered)
    return True


def rollback(settings: Settings, paths: Paths, *, who: str, reason: str, to: int | None = None) -> Rollback:
    """Move @champion back, by default to the champion before it, and put the version that it leaves on hold.

    After an interrupted rollback, the next one completes it and goes no further back.

    Raises:
        UserError: there is no champion, none to go back to, no such version, it is on hold, its files are not the ones
            that were registered, or it does not answer as it did then.
    """
    name = settings.promote.model_name
    with _moving(settings, paths, reason) as client:
        repaired = history.repair(client, name)
        current = resolve_alias(client, name, history.ALIAS)
        if current is None:
            raise UserError(f"{name} has no champion: there is nothing to roll back.")
        if repaired and repaired.move.command == history.ROLLBACK and to in (None, current):
            return Rollback(repaired.move.from_version, current)
        if to == current:
            return Rollback(None, current)
        target = _previous_champion(client, name, current) if to is None else get_version(client, name, to)
        if to is not None and hold_of(client, target):
            raise UserError(f"{name} version {to} is on hold. `d2r release {to}` releases it.")
        recorded_examples.predict(target, signing.trusted_key(settings, paths))
        # The hold comes first: killed in between, this leaves a champion on hold, and not a bad model that returns.
        hold = {"reason": reason, "who": who, "time": _now()}
        client.set_model_version_tag(name, str(current), "hold", json.dumps(hold))
        history.record_and_move(client, name, _move(target, who=who, command=history.ROLLBACK, reason=reason))
    return Rollback(current, int(target.version))


def release(settings: Settings, paths: Paths, version: int, *, who: str) -> bool:
    """End the hold of a version, and of others with the same weights; False if there was none.

    Raises:
        UserError: there is no such version.
    """
    with connect(settings, paths) as client, registry_lock(client, settings.promote.model_name):
        registered = get_version(client, settings.promote.model_name, version)
        released = _release(client, registered)
        if released:
            tag = json.dumps({"who": who, "time": _now()})
            client.set_model_version_tag(registered.name, str(version), "released", tag)
    return released


def hold_of(client: "MlflowClient", version: "ModelVersion") -> str | None:
    """Why, when and by whom the version, or another one of the same weights, was put on hold; None if it is not."""
    for other in _same_weights(client, version):
        if "hold" in other.tags:
            hold = json.loads(other.tags["hold"])
            what = "" if other.version == version.version else f"with version {other.version}, of the same weights, "
            return f"{what}since {hold['time']} by {hold['who']}: {hold['reason']}"
    return None


def check_reason(reason: str) -> None:
    """Raise UserError unless the reason says something and fits into a tag."""
    if not reason.strip() or len(reason) > MAX_REASON:
        raise UserError(f"--reason needs a sentence of at most {MAX_REASON} characters: it goes into the history.")


@contextmanager
def _moving(settings: Settings, paths: Paths, reason: str) -> Iterator["MlflowClient"]:
    """MLflow's client with the registry locked."""
    check_reason(reason)
    with connect(settings, paths) as client, registry_lock(client, settings.promote.model_name):
        yield client


def get_version(client: "MlflowClient", name: str, version: int) -> "ModelVersion":
    """A version of the registered model `name`. Raises UserError if there is none."""
    registered = find_version(client, name, version)
    if registered is None:
        raise UserError(f"{name} has no version {version}. `d2r models` lists them.")
    return registered


def refuse(client: "MlflowClient", version: "ModelVersion") -> None:
    """Raise RefusedError unless the version passed the gate and is not on hold."""
    title = f"{version.name} version {version.version}"
    if hold := hold_of(client, version):
        raise RefusedError(
            f"{title} is on hold {hold.rstrip('.')}. `d2r release {version.version}` lets automatic runs promote it "
            "again; `d2r promote --force` does it now."
        )
    gate = version.tags.get("gate")
    if gate != "passed":
        reasons = " ".join(version.tags.get("gate_reasons", "").splitlines())
        verdict = f"did not pass the gate: {reasons}" if gate else "has not been judged by the gate."
        raise RefusedError(f"{title} {verdict} `d2r promote --force` promotes it all the same.")


def _refuse_rejected(version: "ModelVersion") -> None:
    approval = Approval.of(version)
    if approval is not None and approval.state == "rejected":
        raise RefusedError(approval.sentence(int(version.version)))


def _move(version: "ModelVersion", *, who: str, command: str, reason: str, forced: bool = False) -> Move:
    tags = version.tags
    verdict = f"gate {tags.get('gate', 'not judged')}. {tags.get('gate_reasons', '')}"
    return Move(
        to_version=int(version.version),
        who=who,
        command=command,
        reason=reason,
        evidence=textwrap.shorten(verdict, _MAX_EVIDENCE, placeholder=" ..."),
        run_id=version.run_id or None,
        forced=forced,
    )


def _previous_champion(client: "MlflowClient", name: str, current: int) -> "ModelVersion":
    """The last champion before `current` that still exists, has other weights and is not on hold."""
    same = {int(version.version) for version in _same_weights(client, get_version(client, name, current))}
    for number in reversed(history.champions(history.entries(client, name))):
        version = find_version(client, name, number)
        if number not in same and version is not None and hold_of(client, version) is None:
            return version
    raise UserError(
        f"{name} version {current} is the first champion in the history that is not on hold. Name the version to go "
        "back to: --to VERSION."
    )


def _same_weights(client: "MlflowClient", version: "ModelVersion") -> list["ModelVersion"]:
    """The version and all others with its weights."""
    weights = version.tags.get("weights_sha256")
    if weights is None:  # not registered by `d2r`
        return [version]
    return list(client.search_model_versions(f"name = '{version.name}' and tags.weights_sha256 = '{weights}'"))


def _release(client: "MlflowClient", version: "ModelVersion") -> bool:
    held = [other for other in _same_weights(client, version) if "hold" in other.tags]
    for other in held:
        client.delete_model_version_tag(other.name, str(other.version), "hold")
    return bool(held)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
