"""The history of @champion and @challenger: every move, in the registry itself, so that it is the same on sqlite and on
a server.

An entry is a tag of the registered model, `d2r.move.NUMBER.RANDOM`, with the move as JSON. It is written before the
alias moves, as an intent; a second tag, `d2r.move.NUMBER.RANDOM.outcome`, says afterwards what became of it. `repair`
completes an intent whose writer was killed in between.

Guaranteed: `d2r` adds tags and never changes or deletes one, so an entry stays as it was written; every move by `d2r`
has one entry, whenever its process is killed; a move by hand (MLflow's UI or client) gets an entry with the next
command, without its author. Not guaranteed: whoever may write to the registry can also change or delete these tags. An
entry names the one before it, which shows a deletion from the middle but not from the end.
"""

import getpass
import json
import os
import re
import socket
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from d2r_core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
CHALLENGER = "challenger"
OUTSIDE = "outside d2r"  # the command of a move by hand
ROLLBACK = "rollback"
APPROVE = "approve"
COMPLETED, ABANDONED = "completed", "abandoned"
_ENTRY = re.compile(r"d2r\.move\.(\d{6})\.[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of an alias."""

    to_version: int
    who: str  # user@host, with the Prefect run if there is one
    command: str  # "register", "retrain", "approve", "promote", "rollback" or "outside d2r"
    reason: str
    evidence: str = ""  # the verdict of the gate in one line
    run_id: str | None = None  # MLflow's run of the version
    forced: bool = False
    alias: str = ALIAS
    # What `record_and_move` fills in.
    from_version: int | None = None
    time: str = ""  # UTC, ISO 8601
    previous: str | None = None  # the key of this alias' entry before


class Entry(NamedTuple):
    """A recorded move; its outcome is "completed", "abandoned", or None as long as it is an intent."""

    key: str
    move: Move
    outcome: str | None


def local_user() -> str:
    """The user of this process, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def entries(client: "MlflowClient", name: str, alias: str | None = ALIAS) -> list[Entry]:
    """The moves of an alias (None: of every alias) of the registered model `name`, oldest first.

    Empty if there is no such model.
    """
    return [entry for entry in _entries(_model(client, name)[0]) if alias in (None, entry.move.alias)]


def champions(history: list[Entry]) -> list[int]:
    """The champions that a rollback can go back through, the present one last; moves of @challenger do not count.

    A promotion adds one; a rollback removes those after its target.
    """
    stack: list[int] = []
    for entry in history:
        version = entry.move.to_version
        if entry.outcome == ABANDONED or entry.move.alias != ALIAS:
            continue
        if entry.move.command == ROLLBACK and version in stack:
            while stack[-1] != version:
                stack.pop()
        else:
            stack.append(version)
    return stack


def repair(client: "MlflowClient", name: str) -> Entry | None:
    """Bring history and aliases together; the lock must be held. Returns the intent for @champion that was completed.

    An intent is completed if its alias has not moved since, and abandoned if it is elsewhere or its version was
    deleted. A move that has no entry gets one.
    """
    completed = None
    for alias in (ALIAS, CHALLENGER):
        tags, aliases = _model(client, name)
        version = aliases.get(alias)
        for entry in (entry for entry in _entries(tags) if entry.outcome is None and entry.move.alias == alias):
            version, outcome = _complete(client, name, entry.move, version)
            client.set_registered_model_tag(name, f"{entry.key}.outcome", outcome)
            if alias == ALIAS and outcome == COMPLETED:
                completed = entry._replace(outcome=outcome)
        _record_by_hand(client, name, alias, version)
    return completed


def _complete(client: "MlflowClient", name: str, move: Move, version: int | None) -> tuple[int | None, str]:
    """Make an interrupted move, if its alias still has the `version` from before; the version then, and the outcome."""
    from mlflow.exceptions import MlflowException

    if version == move.to_version:
        return version, COMPLETED
    if version != move.from_version:
        return version, ABANDONED
    try:
        client.set_registered_model_alias(name, move.alias, str(move.to_version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return version, ABANDONED
    return move.to_version, COMPLETED


def _record_by_hand(client: "MlflowClient", name: str, alias: str, version: int | None) -> None:
    """Record a move of the alias that the history does not have."""
    history = entries(client, name, alias)
    if alias == ALIAS:
        recorded = champions(history)
    else:
        recorded = [entry.move.to_version for entry in history if entry.outcome != ABANDONED]
    if version is None or recorded[-1:] == [version]:
        return
    reason = "Moved by hand, or before this history began."
    move = Move(to_version=version, who="unknown", command=OUTSIDE, reason=reason, alias=alias)
    key = _append(client, name, replace(move, from_version=recorded[-1] if recorded else None))
    client.set_registered_model_tag(name, f"{key}.outcome", COMPLETED)


def record_and_move(client: "MlflowClient", name: str, move: Move) -> None:
    """Record a move and make it; the lock must be held, and `repair` comes first.

    Raises:
        UserError: the alias has another version afterwards, because somebody moved it by hand at the same moment.
    """
    key = _append(client, name, replace(move, from_version=_model(client, name)[1].get(move.alias)))
    client.set_registered_model_alias(name, move.alias, str(move.to_version))
    version = _model(client, name)[1].get(move.alias)
    client.set_registered_model_tag(name, f"{key}.outcome", COMPLETED)
    if version != move.to_version:
        raise UserError(f"{name} version {version} was made @{move.alias} at the same moment: see `d2r history`.")


def _append(client: "MlflowClient", name: str, move: Move) -> str:
    history = entries(client, name, alias=None)
    number = int(history[-1].key.split(".")[2]) + 1 if history else 1
    previous = [entry.key for entry in history if entry.move.alias == move.alias]
    # The random part keeps two writers from overwriting each other, should the lease have been lost (see `lock`).
    key = f"d2r.move.{number:06d}.{uuid.uuid4().hex[:8]}"
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    move = replace(move, time=now, previous=previous[-1] if previous else None)
    client.set_registered_model_tag(name, key, json.dumps(asdict(move)))
    return key


def _entries(tags: dict[str, str]) -> list[Entry]:
    keys = sorted(key for key in tags if _ENTRY.fullmatch(key))
    return [Entry(key, Move(**json.loads(tags[key])), tags.get(f"{key}.outcome")) for key in keys]


def _model(client: "MlflowClient", name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The tags and the aliases of a registered model; nothing, if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}, {}
    return dict(model.tags), {alias: int(version) for alias, version in model.aliases.items()}
