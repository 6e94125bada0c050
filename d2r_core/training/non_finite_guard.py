"""A loss or gradient that is NaN or infinite must not reach the weights, on any rank."""

import torch
from torch import Tensor

from d2r_core import distributed
from d2r_core.errors import UserError


class NonFiniteGuard:
    """Skips every optimizer step from the first non-finite loss or gradient on, without waiting for the device.

    All ranks agree: DDP averages gradients, so one rank's NaN would otherwise reach the weights of all. The flag stays
    on the device, where the optimizer's fused step reads it; `check` reads it on the host and raises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.first_bad_step = torch.zeros((), device=device)  # of the current epoch; 0: none

    def before_step(self, loss: Tensor, gradient_norm: Tensor, step: int) -> None:
        """Make the optimizer skip this `step` (from 1) if it or an earlier one is not finite on any rank.

        The gradient of a diverging loss overflows some steps before the loss itself.
        """
        is_finite = torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm)
        is_bad = distributed.all_reduce_max((~is_finite).float()) > 0
        self.first_bad_step = torch.where((self.first_bad_step == 0) & is_bad, float(step), self.first_bad_step)
        self.optimizer.found_inf = (self.first_bad_step > 0).float()  # type: ignore[attr-defined]

    def check(self, epoch: int, steps: int) -> None:
        """Raise UserError if a step of this epoch, of so many steps, was not finite; waits for the device."""
        bad_step = int(self.first_bad_step)
        if bad_step:
            raise UserError(
                f"epoch {epoch}, step {bad_step} of {steps}: the loss or its gradient is not finite. Training stopped "
                "before this step changed the weights. A lower learning_rate, or gradient_clip, usually helps."
            )
