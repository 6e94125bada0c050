"""Stopping a long loop between two steps: on SIGINT, on SIGTERM (a preempted machine) or at a time limit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A loop stopped on request after saving its state; the message says where it will continue."""


@contextmanager
def stop_requests(max_minutes: float | None) -> Iterator[Callable[[], str | None]]:
    """Yield a function that returns why to stop, or None; signals inside the block are recorded for it, not raised.

    Outside the main thread signals cannot be handled, and only the time limit applies.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    received: list[str] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    def reason() -> str | None:
        if received:
            return f"stopped by {received[0]}"
        return f"max_minutes ({max_minutes:g}) are over" if deadline and time.monotonic() > deadline else None

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = [(number, signal.signal(number, record)) for number in numbers]
    try:
        yield reason
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
