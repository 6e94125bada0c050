"""The points of a training on their way from its file to its MLflow run, whether the server is there or not."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2r_core import files
from tasks.tracking import errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LONGEST_PAUSE = 30.0  # seconds between two attempts while the server is away
_BATCH = 500  # metrics; a server takes 1000 at once


class Tail:
    """The points that are new at the end of a file: each iteration yields those of the lines added since the last.

    A training that continues repeats what came after its last saved state. It repeats it alike, so only points that
    lie beyond all earlier ones are yielded. A line that is not whole is left for later; one that never became whole
    is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes read so far
        self._last = (0, 0.0)

    def __iter__(self) -> Iterator[list["Metric"]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            while (line := stream.readline()).endswith(b"\n"):
                self.offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                position = row["epoch"], row.get("step", math.inf)
                if position > self._last:
                    self._last = position
                    yield _metrics(row)


class Note(NamedTuple):
    """What lies beside the points: the run that they go to, and how many bytes of them it has."""

    run_id: str
    offset: int


def read_note(points: Path) -> Note | None:
    """The note beside `points`, if there is one."""
    path = _note_path(points)
    return Note(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


class Shipment:
    """A thread that sends the points to the run, from where the note beside them says.

    While the server is down or slow it keeps trying, and the training knows nothing of it. A batch that was sent
    twice, since its answer was lost, counts once: a point keeps its time, and MLflow drops what it has to the letter.

    Args:
        taken: called in the thread after each batch that the server took before the end.
    """

    def __init__(self, client: "MlflowClient", run_id: str, points: Path, taken: Callable[[], None]) -> None:
        self._client, self._run_id, self._points, self._taken = client, run_id, points, taken
        self._finishing, self._given_up, self._writing = threading.Event(), threading.Event(), threading.Lock()
        self._tail = Tail(points)
        note = read_note(points)
        if note is None or note.run_id != run_id:
            self._write_note()
        elif note.offset:
            for _ in self._tail:
                if self._tail.offset >= note.offset:
                    break
        self._thread = threading.Thread(target=self._run, name="points to MLflow", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> int:
        """Send what is left, for at most so long; returns how many points the server has not confirmed.

        Afterwards nothing is written beside the points any more.
        """
        self._finishing.set()
        self._thread.join(seconds)
        with self._writing:
            self._given_up.set()
        note = read_note(self._points)
        assert note is not None
        tail = Tail(self._points)
        return sum(tail.offset > note.offset for _ in tail)

    def _run(self) -> None:
        batch: list[Metric] = []
        failures = 0
        while not self._given_up.is_set():
            finishing = self._finishing.is_set()  # asked before the file is read, so that nothing is overlooked
            try:
                batch = batch or self._next_batch()
                if batch:
                    self._client.log_batch(self._run_id, batch)
                    batch = []
                    self._write_note()
                    failures = 0
                    if not self._finishing.is_set():
                        self._taken()
                elif finishing:
                    return
                else:
                    self._pause(_POLL_SECONDS)
            except Exception as error:  # whatever it is, the training goes on
                if not failures:
                    reason = errors.first_line([*errors.chain(error)][-1])
                    _log.warning("MLflow does not take points at present (%s); they are kept and sent later.", reason)
                failures += 1
                self._pause(_POLL_SECONDS if finishing else min(2.0**failures, _LONGEST_PAUSE))

    def _next_batch(self) -> list["Metric"]:
        batch: list[Metric] = []
        for metrics in self._tail:
            batch += metrics
            if len(batch) >= _BATCH:
                break
        return batch

    def _write_note(self) -> None:
        content = Note(self._run_id, self._tail.offset)._asdict()
        with self._writing:
            if not self._given_up.is_set():
                files.write_text(_note_path(self._points), json.dumps(content))

    def _pause(self, seconds: float) -> None:
        (self._given_up if self._finishing.is_set() else self._finishing).wait(seconds)


def _note_path(points: Path) -> Path:
    return points.with_name("mlflow.json")


def _metrics(row: dict[str, float]) -> list["Metric"]:
    """A line as MLflow's metrics: an epoch's end by the epoch, a point within it as `step/...` by the step of all."""
    from mlflow.entities import Metric

    time, epoch = int(row.pop("time") * 1000), int(row.pop("epoch"))
    prefix, number = "", epoch
    if "step" in row:
        steps = int(row.pop("steps"))
        prefix, number = "step/", (epoch - 1) * steps + int(row.pop("step"))
    return [Metric(prefix + name, value, time, number) for name, value in row.items()]
