"""The history of @champion: every move, in the registry itself, so that it is the same on sqlite and on a server.

An entry is a tag of the registered model, `d2r.move.NUMBER.RANDOM`, with the move as JSON. It is written before the
alias moves, as an intent; a second tag, `d2r.move.NUMBER.RANDOM.outcome`, says afterwards what became of it. `repair`
completes an intent whose writer was killed in between.

Guaranteed: `d2r` adds tags and never changes or deletes one, so an entry stays as it was written; every move by `d2r`
has one entry, whenever its process is killed; a move by hand (MLflow's UI or client) gets an entry with the next
command, without its author. Not guaranteed: whoever may write to the registry can also change or delete these tags. An
entry names the one before it, which shows a deletion from the middle but not from the end.
"""

import json
import re
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from d2r_core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
OUTSIDE = "outside d2r"  # the command of a move by hand
ROLLBACK = "rollback"
COMPLETED, ABANDONED = "completed", "abandoned"
_ENTRY = re.compile(r"d2r\.move\.(\d{6})\.[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of @champion."""

    to_version: int
    who: str  # user@host, with the Prefect run if there is one
    command: str  # "retrain", "promote", "rollback" or "outside d2r"
    reason: str
    evidence: str = ""  # the verdict of the gate in one line
    run_id: str | None = None  # MLflow's run of the version
    forced: bool = False
    alias: str = ALIAS
    # What `record_and_move` fills in.
    from_version: int | None = None
    time: str = ""  # UTC, ISO 8601
    previous: str | None = None  # the key of the entry before


class Entry(NamedTuple):
    """A recorded move; its outcome is "completed", "abandoned", or None as long as it is an intent."""

    key: str
    move: Move
    outcome: str | None


def entries(client: "MlflowClient", name: str) -> list[Entry]:
    """The history of the registered model `name`, oldest first; empty if there is no such model."""
    return _entries(_model(client, name)[0])


def champions(history: list[Entry]) -> list[int]:
    """The champions that a rollback can go back through, the present one last.

    A promotion adds one; a rollback removes those after its target.
    """
    stack: list[int] = []
    for entry in history:
        version = entry.move.to_version
        if entry.outcome == ABANDONED:
            continue
        if entry.move.command == ROLLBACK and version in stack:
            while stack[-1] != version:
                stack.pop()
        else:
            stack.append(version)
    return stack


def repair(client: "MlflowClient", name: str) -> Entry | None:
    """Bring history and alias together; the lock must be held. Returns the intent that was completed, if any.

    An intent is completed if the alias has not moved since, and abandoned if it is elsewhere or its version was
    deleted. A move that has no entry gets one.
    """
    from mlflow.exceptions import MlflowException

    tags, champion = _model(client, name)
    history = _entries(tags)
    completed = None
    for entry in (entry for entry in history if entry.outcome is None):
        outcome = COMPLETED if champion == entry.move.to_version else ABANDONED
        if champion == entry.move.from_version:
            try:
                client.set_registered_model_alias(name, ALIAS, str(entry.move.to_version))
                champion, outcome = entry.move.to_version, COMPLETED
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        client.set_registered_model_tag(name, f"{entry.key}.outcome", outcome)
        if outcome == COMPLETED:
            completed = entry._replace(outcome=outcome)
    recorded = champions(entries(client, name))
    if champion is not None and recorded[-1:] != [champion]:
        reason = "Moved by hand, or before this history began."
        by_hand = Move(to_version=champion, who="unknown", command=OUTSIDE, reason=reason)
        key = _append(client, name, replace(by_hand, from_version=recorded[-1] if recorded else None))
        client.set_registered_model_tag(name, f"{key}.outcome", COMPLETED)
    return completed


def record_and_move(client: "MlflowClient", name: str, move: Move) -> None:
    """Record a move and make it; the lock must be held, and `repair` comes first.

    Raises:
        UserError: the alias has another version afterwards, because somebody moved it by hand at the same moment.
    """
    key = _append(client, name, replace(move, from_version=_model(client, name)[1]))
    client.set_registered_model_alias(name, ALIAS, str(move.to_version))
    champion = _model(client, name)[1]
    client.set_registered_model_tag(name, f"{key}.outcome", COMPLETED)
    if champion != move.to_version:
        raise UserError(f"{name} version {champion} was made @champion at the same moment: see `d2r history`.")


def _append(client: "MlflowClient", name: str, move: Move) -> str:
    history = entries(client, name)
    number = int(history[-1].key.split(".")[2]) + 1 if history else 1
    # The random part keeps two writers from overwriting each other, should the lease have been lost (see `lock`).
    key = f"d2r.move.{number:06d}.{uuid.uuid4().hex[:8]}"
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    move = replace(move, time=now, previous=history[-1].key if history else None)
    client.set_registered_model_tag(name, key, json.dumps(asdict(move)))
    return key


def _entries(tags: dict[str, str]) -> list[Entry]:
    keys = sorted(key for key in tags if _ENTRY.fullmatch(key))
    return [Entry(key, Move(**json.loads(tags[key])), tags.get(f"{key}.outcome")) for key in keys]


def _model(client: "MlflowClient", name: str) -> tuple[dict[str, Any], int | None]:
    """The tags and the champion of a registered model; nothing, if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}, None
    champion = model.aliases.get(ALIAS)
    return dict(model.tags), None if champion is None else int(champion)
