"""The rule by which reference logits were recorded: weights that depend on their names and shapes alone."""

import math

import torch
from torch import nn


def fill(model: nn.Module) -> None:
    """Fill `model`, which is float64."""
    state = model.state_dict()
    for i, name in enumerate(sorted(key for key in state if not key.endswith("num_batches_tracked"))):
        tensor = state[name]
        s = torch.sin(0.37 * i + 0.013 * torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape)
        if name.endswith("running_var"):
            s = 1 + 0.5 * s**2
        elif name.endswith("running_mean"):
            s = 0.1 * s
        elif tensor.ndim >= 2:
            s = s * math.sqrt(2 / tensor[0].numel())
        elif name.endswith("weight"):
            s = 1 + 0.1 * s
        else:
            s = 0.1 * s
        state[name] = s
    model.load_state_dict(state)


def images(size: int) -> torch.Tensor:
    """Two images, float64 (2, 3, size, size)."""
    wave = 0.5 + 0.5 * torch.sin(0.01 * torch.arange(2 * 3 * size * size, dtype=torch.float64))
    return wave.reshape(2, 3, size, size)
