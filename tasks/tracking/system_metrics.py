"""The machine's memory, utilisation and power beside a run: MLflow's own monitor, kept going."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def monitor(run_id: str) -> Iterator[Callable[[], None]]:
    """Yield a function that starts the monitor of this machine and its GPUs if it is not running.

    The end of the block stops it. MLflow's monitor ends for good at the first request that fails, so call the function
    whenever the server has answered.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    started: list[SystemMetricsMonitor] = []

    def start() -> None:
        if not any(thread.name == SystemMetricsMonitor.__name__ for thread in threading.enumerate()):
            started.append(SystemMetricsMonitor(run_id, resume_logging=True))  # type: ignore[no-untyped-call]
            started[-1].start()  # type: ignore[no-untyped-call]

    try:
        yield start
    finally:
        for started_monitor in started:
            started_monitor.finish()  # type: ignore[no-untyped-call]
