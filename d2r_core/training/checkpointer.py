"""When and where the state of an unfinished training is saved."""

import time
import warnings
from pathlib import Path
from typing import Any

from d2r_core import checkpoint, distributed


class Checkpointer:
    """Saves a training's state in `folder` and loads it from there.

    Rank 0 alone reads and writes: on a job of several machines it alone has the file.

    Args:
        folder: named after everything that the training depends on, so that no other training resumes from it.
        save_minutes: time between two saves within an epoch.
    """

    def __init__(self, folder: Path, save_minutes: float = 10.0) -> None:
        self.folder = folder
        self.save_minutes = save_minutes
        self._schedule_next_save()

    def is_due(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        return time.monotonic() >= self.next_save

    def save(self, state: dict[str, Any]) -> None:
        """Write the state. Raises UserError if that fails; the previous state is intact then."""
        if distributed.rank() == 0:
            checkpoint.save_state(self.folder, state)
        self._schedule_next_save()

    def load(self) -> dict[str, Any] | None:
        """Rank 0's newest undamaged state on every rank, tensors on the CPU; None if there is none."""
        state = checkpoint.load_state(self.folder, warnings.warn) if distributed.rank() == 0 else None
        return distributed.broadcast(state)

    def _schedule_next_save(self) -> None:
        self.next_save = time.monotonic() + 60 * self.save_minutes
