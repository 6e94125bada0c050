"""An average of the model's weights along the training, with BatchNorm statistics of its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from d2r_core.training.config import Averaging


class WeightAverage:
    """The average that `averaging` describes (not "none"), starting from the model's current weights.

    "ema" is updated after every step of the training, "swa" after every epoch from `from_epoch` on.
    """

    def __init__(self, model: nn.Module, averaging: Averaging) -> None:
        assert averaging.name != "none"
        self.averaging = averaging
        ema = get_ema_multi_avg_fn(averaging.decay) if averaging.name == "ema" else None
        self.averaged = AveragedModel(model, multi_avg_fn=ema)

    @property
    def model(self) -> nn.Module:
        """The model that holds the averaged weights."""
        model: nn.Module = self.averaged.module
        return model

    def update_after_step(self, model: nn.Module) -> None:
        if self.averaging.name == "ema":
            self.averaged.update_parameters(model)

    def update_after_epoch(self, model: nn.Module, epoch: int) -> None:
        if self.averaging.name == "swa" and epoch >= self.averaging.from_epoch:
            self.averaged.update_parameters(model)

    @torch.no_grad()
    def refresh_batch_norm(self, images: Iterable[Tensor]) -> None:
        """Compute BatchNorm's statistics anew: over the average's own activations on batches (B, 3, H, W)."""
        update_bn(images, self.averaged)

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state)
