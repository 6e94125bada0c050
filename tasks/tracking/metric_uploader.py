"""The points of a training: from its file to its MLflow run, whether the server answers or not.

MLflow's own asynchronous logging cannot do this: it drops what an outage made fail (`docs/log.md`).
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.tracking import errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LONGEST_PAUSE = 30.0  # seconds between two attempts while the server does not answer
_BATCH_SIZE = 500  # metrics; a server takes 1000 at once


class Tail:
    """The new points at the end of a file: each iteration yields the metrics of each line added since the last one.

    A training that continues repeats what came after its last saved state. It computes the same values again, so only
    points beyond all earlier ones are yielded. An incomplete line is left for later; one that was never completed is
    skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0  # bytes read so far
        self._last_position = (0, 0.0)

    def __iter__(self) -> Iterator[list["Metric"]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            while (line := stream.readline()).endswith(b"\n"):
                self._offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                position = row["epoch"], row.get("step", math.inf)
                if position > self._last_position:
                    self._last_position = position
                    yield _metrics(row)


class MetricUploader:
    """Sends points to a run, batch by batch, without those that it already has.

    A batch that was sent twice because its response was lost counts once: a point keeps its time, and MLflow drops
    exact duplicates.

    Args:
        points: yields the metrics of a point; when it is iterated again, those that were not yielded yet.
    """

    def __init__(self, client: "MlflowClient", run_id: str, points: Iterable[list["Metric"]]) -> None:
        self._client, self._run_id, self._points = client, run_id, points
        self._logged_steps: dict[str, set[int]] | None = None
        self._batch: list[list[Metric]] = []
        self.confirmed = 0  # points that the server has

    def send_batch(self) -> bool:
        """Send the next batch; False if there is none. After an error the next call sends the same batch again.

        Raises:
            MlflowException: the server does not answer, or refuses.
        """
        if self._logged_steps is None:
            self._logged_steps = self._read_logged_steps()
        self._batch = self._batch or self._next_batch()
        metrics = [metric for point in self._batch for metric in point if not self._is_logged(metric)]
        if metrics:
            self._client.log_batch(self._run_id, metrics)
        sent = len(self._batch)
        self.confirmed += sent
        self._batch = []
        return sent > 0

    def _read_logged_steps(self) -> dict[str, set[int]]:
        names = self._client.get_run(self._run_id).data.metrics
        return {
            name: {metric.step for metric in self._client.get_metric_history(self._run_id, name)}
            for name in names
            if not name.startswith("system/")
        }

    def _is_logged(self, metric: "Metric") -> bool:
        assert self._logged_steps is not None
        return metric.step in self._logged_steps.get(metric.key, ())

    def _next_batch(self) -> list[list["Metric"]]:
        batch, size = [], 0
        for point in self._points:
            batch.append(point)
            size += len(point)
            if size >= _BATCH_SIZE:
                break
        return batch


class BackgroundUpload:
    """A thread that sends the points of a growing file to a run.

    While the server is down or slow it keeps trying, and the training does not notice.

    Args:
        points: the file that the training appends to.
        on_success: called in the thread after each batch that the server took before the end.
    """

    def __init__(self, client: "MlflowClient", run_id: str, points: Path, on_success: Callable[[], None]) -> None:
        self._points, self._on_success = points, on_success
        self._uploader = MetricUploader(client, run_id, Tail(points))
        self._finishing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="points to MLflow", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> int:
        """Send the remaining points, for at most that long; returns how many points the server has not confirmed."""
        self._finishing.set()
        self._thread.join(seconds)
        self._given_up.set()
        return sum(1 for _ in Tail(self._points)) - self._uploader.confirmed

    def _run(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            finishing = self._finishing.is_set()  # read before the file is, so that no point is missed
            try:
                if self._uploader.send_batch():
                    failures = 0
                    if not self._finishing.is_set():
                        self._on_success()
                elif finishing:
                    return
                else:
                    self._pause(_POLL_SECONDS)
            except Exception as error:  # whatever it is, the training goes on
                if not failures:
                    reason = errors.root_cause(error)
                    _log.warning("MLflow does not take points at present (%s); they are sent later.", reason)
                failures += 1
                self._pause(_POLL_SECONDS if finishing else min(2.0**failures, _LONGEST_PAUSE))

    def _pause(self, seconds: float) -> None:
        (self._given_up if self._finishing.is_set() else self._finishing).wait(seconds)


def _metrics(row: dict[str, float]) -> list["Metric"]:
    """A line as MLflow's metrics: an epoch's end by its epoch, a point within it as `step/...` by the overall step."""
    from mlflow.entities import Metric

    time, epoch = int(row.pop("time") * 1000), int(row.pop("epoch"))
    prefix, number = "", epoch
    if "step" in row:
        steps = int(row.pop("steps"))
        prefix, number = "step/", (epoch - 1) * steps + int(row.pop("step"))
    return [Metric(prefix + name, value, time, number) for name, value in row.items()]
