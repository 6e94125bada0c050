"""Learning rate as a function of the epoch, as a factor on the base rate."""

import math
from typing import Literal

Schedule = Literal["step", "constant", "cosine", "one_cycle"]

_RISE = 0.3  # share of one_cycle's epochs in which the rate rises


def factor(schedule: Schedule, epoch: int, epochs: int, share: float = 0.0) -> float:
    """What the base learning rate is multiplied with in `epoch`, 1 to `epochs`, of which `share` (0 to 1) is done.

    `step` is the published recipe, whose 100 epochs are scaled to `epochs`: 0.2 in the first epoch, 0.1 after 75 % of
    them, 0.01 after 90 %. `cosine` falls from 1 towards 0 (Loshchilov & Hutter 2017). `one_cycle` rises linearly to 1
    in 30 % of the epochs and falls linearly to 0 (Smith & Topin 2019).
    """
    done = (epoch - 1 + share) / epochs
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "one_cycle":
            return done / _RISE if done < _RISE else (1.0 - done) / (1.0 - _RISE)
        case "step":
            if epoch == 1:
                return 0.2
            if epoch > 0.9 * epochs:
                return 0.01
            return 0.1 if epoch > 0.75 * epochs else 1.0
