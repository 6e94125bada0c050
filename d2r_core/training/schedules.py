"""Learning rate schedules, as factors on the base rate."""

import math
from typing import Literal

Schedule = Literal["step", "constant", "cosine", "one_cycle"]

_WARM_UP = 0.3  # fraction of one_cycle's epochs in which the rate rises


def factor(schedule: Schedule, epoch: int, epochs: int, fraction: float = 0.0) -> float:
    """The factor on the base learning rate in `epoch`, 1 to `epochs`, of which `fraction` (0 to 1) is complete.

    `step` is the published recipe with its 100 epochs scaled to `epochs`: 0.2 in the first epoch, then 1, 0.1 after
    75 % of them, 0.01 after 90 %. `cosine` falls from 1 towards 0 (Loshchilov & Hutter 2017). `one_cycle` rises
    linearly to 1 in 30 % of the epochs and falls linearly to 0 (Smith & Topin 2019).
    """
    progress = (epoch - 1 + fraction) / epochs
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "one_cycle":
            return progress / _WARM_UP if progress < _WARM_UP else (1.0 - progress) / (1.0 - _WARM_UP)
        case "step":
            if epoch == 1:
                return 0.2
            if epoch > 0.9 * epochs:
                return 0.01
            return 0.1 if epoch > 0.75 * epochs else 1.0
