"""An evaluation seen while it runs: which attack, on how many images that are still robust, how much time is left."""

import sys
import time
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm import tqdm


class Step(NamedTuple):
    """One attack as planned."""

    name: str
    images: int
    passes: int  # of an image that is robust to the end: forward passes, and backward ones


class Progress:
    """Counts the passes of single images through the model: a bar on a terminal, elsewhere a line for each attack."""

    def __init__(self, title: str, model: nn.Module, plan: list[Step], *, show: bool) -> None:
        self.title, self.plan, self.show = title, plan, show
        total = sum(step.images * step.passes for step in plan)
        disable = None if show else True
        self.bar = tqdm(total=total, disable=disable, leave=False, file=sys.stderr, unit=" passes", unit_scale=True)
        self.passes, self.started = 0, time.monotonic()
        self.hook = model.register_forward_hook(self._count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()
        self.bar.close()

    def begin(self, name: str, robust: int) -> None:
        """An attack of the plan starts on the images that are robust so far; those after it will get no more."""
        place = [step.name for step in self.plan].index(name)
        share = robust / max(self.plan[place].images, 1)
        left = share * sum(step.images * step.passes for step in self.plan[place:])
        line = f"{self.title}: {name}, {robust} images"
        if self.show and self.bar.disable:
            seconds = (time.monotonic() - self.started) / self.passes * left if self.passes else 0.0
            print(f"{line}{f', about {_duration(seconds)} left' if seconds >= 1 else ''}", flush=True)
        self.bar.total = self.passes + int(left)
        self.bar.set_description(line)

    def _count(self, model: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        passes = len(logits) * (2 if inputs[0].requires_grad else 1)
        self.passes += passes
        self.bar.update(passes)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
