"""An evaluation seen while it runs: which attack, how many images are through, how many are robust, the time left."""

import sys
import time
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm import tqdm

from d2r_core import distributed

SECONDS = 30.0  # between two lines about the same attack, where there is no terminal

_BAR = "{desc} {percentage:3.0f} % |{bar:20}| {elapsed}"


class Step(NamedTuple):
    """One attack as planned."""

    name: str
    images: int
    passes: int  # of an image that is robust to the end: forward passes, and backward ones


class Progress:
    """Shows how far the attacks of a plan are: a bar on a terminal, elsewhere a line every `SECONDS` and at an end.

    The time left comes from the passes of single images through the model, which it counts, and those that the images
    still to come will take if they are as robust as those before; images from a cache take none.
    """

    def __init__(self, title: str, model: nn.Module, plan: list[Step], *, show: bool) -> None:
        self.title, self.plan, self.show = title, plan, show
        disable = None if show else True
        self.bar = tqdm(total=1, disable=disable, leave=False, file=sys.stderr, bar_format=_BAR)
        self.processes = distributed.world()  # each takes an equal share of the images
        self.place = self.images = self.robust_before = self.finished = self.robust = 0
        self.passes = self.passes_of_batch = 0
        self.started = self.shown = time.monotonic()
        self.hook = model.register_forward_hook(self._count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()
        self.bar.close()

    def begin(self, name: str, images: int, robust: int) -> None:
        """An attack of the plan starts on `images` images, `robust` of which were robust so far."""
        self.place = [step.name for step in self.plan].index(name)
        self.images, self.robust_before = images, robust
        self.finished = self.robust = self.passes_of_batch = 0
        self._show()

    def advance(self, images: int, robust: int) -> None:
        """The attack is through with `images` more, of which `robust` are robust to it."""
        self.finished = min(self.images, self.finished + images * self.processes)
        self.robust = min(self.finished, self.robust + robust * self.processes)
        self.passes_of_batch = 0
        self._show(at_end=self.finished == self.images)

    def line(self) -> str:
        """Such as "target: PGD-20, 128 of 1000 images, 71 still robust, about 2 min left"."""
        text = f"{self.title}: {self.plan[self.place].name}, {self.finished} of {self.images} images"
        text += f", {self.robust} still robust" if self.finished else ""
        seconds = (time.monotonic() - self.started) / self.passes * self._passes_left() if self.passes else 0.0
        return f"{text}, about {_duration(seconds)} left" if seconds >= 1 else text

    def _passes_left(self) -> float:
        """Of this process, to the end of the plan."""
        share = self.robust_before / max(self.plan[self.place].images, 1)
        later = share * sum(step.images * step.passes for step in self.plan[self.place + 1 :])
        robust_left = (self.images - self.finished) * self.robust_before / max(self.images, 1)
        present = robust_left * self.plan[self.place].passes / self.processes - self.passes_of_batch
        return max(present, 0.0) + later / self.processes

    def _count(self, model: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        passes = len(logits) * (2 if inputs[0].requires_grad else 1)
        self.passes += passes
        self.passes_of_batch += passes
        self._show()

    def _show(self, *, at_end: bool = False) -> None:
        if not self.show:
            return
        now = time.monotonic()
        if not self.bar.disable:
            if at_end or now - self.shown >= self.bar.mininterval:
                self.shown = now
                self.bar.total = max(1, self.passes + round(self._passes_left()))
                self.bar.n = self.passes
                self.bar.set_description_str(self.line())
        elif at_end or now - self.shown >= SECONDS:
            self.shown = now
            print(self.line(), flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
