"""One writer at a time in the registry: a file lock for a local database, a lease on a server.

MLflow has no compare-and-set on aliases and tags. What it does have is a unique name for each registered model.

- **sqlite**: `flock` on a file beside the database. It excludes all processes on this machine, and the kernel releases
  it when its holder dies, `kill -9` included. It does not exclude a server on the same database file.
- **Anything else**: a registered model `NAME.lock`, which exactly one process can create, on however many machines. Its
  holder renews it every `HEARTBEAT` seconds. Whoever sees no renewal for `LEASE` seconds, by its own clock, takes it
  over. A holder that was suspended, or cut off from the server, for longer than that does not notice and goes on: then
  two processes may write. They do not overwrite each other's history (see `history`), and one champion remains, since
  an alias has one version.
"""

import fcntl
import logging
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from d2r_core.errors import UserError
from tasks.tracking.errors import UnavailableError

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEARTBEAT = 5.0
LEASE = 30.0
WAIT = 900.0  # a registration uploads all files of a model while it holds the lock
_SQLITE = "sqlite:///"
_log = logging.getLogger(__name__)


@contextmanager
def registry_lock(client: "MlflowClient", name: str) -> Iterator[None]:
    """Hold the lock of the registered model `name` for the block. Not reentrant; `connection.configure` comes first.

    Raises:
        UnavailableError: another process has held it for `WAIT` seconds.
        UserError: the lock file cannot be written.
    """
    import mlflow

    uri = mlflow.get_registry_uri()
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE).partition("?")[0])
        with _file_lock(database.with_name(f"{database.name}.registry.lock")):
            yield
    else:
        with _lease(client, f"{name}.lock"):
            yield


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    try:
        stream = path.open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}), so nothing can be changed in the registry.") from None
    with stream:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(deadline, str(path))
        yield


@contextmanager
def _lease(client: "MlflowClient", lock: str) -> Iterator[None]:
    token = uuid.uuid4().hex
    tombstone = _acquire(client, lock, token)
    released = threading.Event()
    heartbeat = threading.Thread(target=_renew, args=(client, lock, released), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        released.set()
        heartbeat.join()
        if _holder(client, lock).get("token") == token:
            client.delete_registered_model(lock)
        else:
            _log.warning("The lease %s was lost meanwhile; `d2r history` shows who else moved @champion.", lock)
        if tombstone:
            client.delete_registered_model(tombstone)


def _acquire(client: "MlflowClient", lock: str, token: str) -> str | None:
    """Create the lock, after its holder released it or died; returns the name of the dead holder's lock, if any."""
    deadline = time.monotonic() + WAIT
    tombstone, since = None, time.monotonic()
    last_seen: dict[str, str] = {}
    while True:
        if _create(client, lock, token):
            return tombstone
        holder = _holder(client, lock)
        if holder.get("token") == token:  # the response to our creation was lost, and MLflow sent it again
            return tombstone
        if holder != last_seen:
            last_seen, since = holder, time.monotonic()
        elif holder and time.monotonic() - since > LEASE:
            # Only one process can give it this name: a slower one cannot remove the lock of the next holder.
            if _rename(client, lock, f"{lock}.{holder['token']}"):
                tombstone = f"{lock}.{holder['token']}"
            continue
        _wait(deadline, lock)


def _create(client: "MlflowClient", lock: str, token: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(lock, {"token": token, "heartbeat": "0"}, "Lock of `d2r`; safe to delete.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _rename(client: "MlflowClient", lock: str, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.rename_registered_model(lock, name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return False
    return True


def _holder(client: "MlflowClient", lock: str) -> dict[str, str]:
    """The tags of the lock; empty if nobody holds it."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(lock).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _renew(client: "MlflowClient", lock: str, released: threading.Event) -> None:
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    count = 0
    while not released.wait(HEARTBEAT):
        count += 1
        with suppress(MlflowException, RequestException):  # the next heartbeat may arrive
            client.set_registered_model_tag(lock, "heartbeat", str(count))


def _wait(deadline: float, lock: str) -> None:
    if time.monotonic() > deadline:
        raise UnavailableError(f"Another process has been changing the registry for {WAIT:.0f} s (lock {lock}).")
    time.sleep(random.uniform(0.1, 0.3))
