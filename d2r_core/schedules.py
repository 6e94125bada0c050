"""Learning rate as a function of the epoch, as a factor on the base rate."""

import math
from typing import Literal

Schedule = Literal["step", "constant", "cosine"]


def factor(schedule: Schedule, epoch: int, epochs: int) -> float:
    """What the base learning rate is multiplied with in `epoch`, 1 to `epochs`.

    `step` is the published recipe, whose 100 epochs are scaled to `epochs`: 0.2 in the first epoch, 0.1 after 75 % of
    them, 0.01 after 90 %. `cosine` falls from 1 towards 0 (Loshchilov & Hutter 2017).
    """
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (epoch - 1) / epochs))
        case "step":
            if epoch == 1:
                return 0.2
            if epoch > 0.9 * epochs:
                return 0.01
            return 0.1 if epoch > 0.75 * epochs else 1.0
