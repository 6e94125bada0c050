"""The normalisation that some networks were trained behind, as a part of the model: attacks stay in [0, 1]."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

# "mean" and "std" of each colour, or "per_image": every image has its own (TensorFlow's per_image_standardization)
Normalization = Mapping[str, Sequence[float]] | Literal["per_image"]

# What checkpoints are normalised with, by name; others are given in numbers.
NORMALIZATIONS: Mapping[str, Normalization] = {
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "symmetric": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},  # 2 x - 1
    "per_image": "per_image",
}


class Normalized(nn.Module):
    """`network` on normalised images: (B, 3, H, W) in [0, 1] -> its logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network, self.normalization = network, normalization
        if normalization != "per_image":
            assert isinstance(normalization, Mapping)
            for name in ("mean", "std"):
                value = torch.tensor(normalization[name]).reshape(1, 3, 1, 1)
                self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalization != "per_image":
            return self.network((x - self.mean) / self.std)
        std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        return self.network((x - mean) / std.clamp_min(x[0].numel() ** -0.5))
