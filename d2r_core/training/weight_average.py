"""An average of the target's weights along the training, with its own BatchNorm statistics."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

Averaging = Literal["none", "ema", "swa"]


def averaged(model: nn.Module, averaging: Averaging, decay: float) -> AveragedModel | None:
    """The average that starts at the present weights.

    "ema": exponential, with `decay` at each step (Polyak; as TRADES-AWP and later work use it). "swa": the plain mean
    of the epochs' weights (Izmailov et al. 2018).
    """
    match averaging:
        case "none":
            return None
        case "ema":
            return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        case "swa":
            return AveragedModel(model)


@torch.no_grad()
def refresh_batch_norm(average: AveragedModel, images: Iterable[Tensor]) -> None:
    """Give the average the BatchNorm statistics of its own activations on the training images (B, 3, H, W)."""
    update_bn(images, average)
