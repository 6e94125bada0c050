"""The log of a training while it runs: a progress bar on a terminal, a line per epoch, and every point in a file."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm


class MetricsLog:
    """The Trainer's logger: writes to the file first, then to the screen.

    The file has one JSON object per line: `{"time": seconds, "epoch": 3, ...}` at an epoch's end, with `"step"` and
    `"steps"` for a point within it. A training that continues appends to it; where it repeats an epoch, the later
    lines count.
    """

    def __init__(self, stage: str, epochs: int, path: Path, *, show: bool) -> None:
        self.stage, self.epochs_total, self.path = stage, epochs, path
        self.bar = tqdm(disable=None if show else True, leave=False, file=sys.stderr, unit="step")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a killed process left an incomplete last line
            with path.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def log_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Write the figures of a finished epoch."""
        self._write({"epoch": epoch, **metrics})
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{self.stage} epoch {epoch}/{self.epochs_total}: {values}", flush=True)

    def log_step(self, means: Mapping[str, float], epoch: int, step: int, steps: int) -> None:
        """Write the means over the epoch so far."""
        self._write({"epoch": epoch, "step": step, "steps": steps, **means})
        if self.bar.total != steps or step <= self.bar.n:
            self.bar.reset(steps)
        self.bar.set_description(f"{self.stage} {epoch}/{self.epochs_total}", refresh=False)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def epochs(self) -> list[dict[str, float]]:
        """The rows of all epochs so far, in order, including those before an interruption."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # an incomplete line of a killed process
                rows.append(json.loads(line))
        last_rows = {row["epoch"]: row for row in rows if "step" not in row}
        return [{key: value for key, value in last_rows[epoch].items() if key != "time"} for epoch in sorted(last_rows)]

    def _write(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": time.time(), **row}) + "\n")
