"""Stopping a long loop between two steps: on SIGINT, SIGTERM (a spot machine's notice) or when its time is up."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A loop was told to stop and has saved what it had; the message says where it continues."""


@contextmanager
def stop_requests(max_minutes: float | None) -> Iterator[Callable[[], str | None]]:
    """Yield a function that says why to stop, or None; signals inside the block only leave a note for it.

    Outside the main thread signals cannot be caught, and only the time counts.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    received: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    def reason() -> str | None:
        if received:
            return f"stopped by {received[0]}"
        return f"max_minutes ({max_minutes:g}) are over" if deadline and time.monotonic() > deadline else None

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [(number, signal.signal(number, note)) for number in numbers]
    try:
        yield reason
    finally:
        for number, handler in before:
            signal.signal(number, handler)
