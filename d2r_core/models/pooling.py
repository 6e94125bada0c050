"""The head's average pooling: the published window at 32 and 64 pixels, global at other sizes."""

import torch.nn.functional as F
from torch import Tensor

_PUBLISHED_SIZES = (32, 64)  # pixels


def pool(features: Tensor, image_size: int, window: int) -> Tensor:
    """Features (B, C, h, w) of an image of `image_size` pixels -> (B, C * positions)."""
    if image_size in _PUBLISHED_SIZES:
        return F.avg_pool2d(features, window).flatten(1)
    return features.mean((2, 3))


def pooled_positions(image_size: int, reduction: int, window: int) -> int:
    """The number of positions after `pool` of a feature map that is `reduction` times smaller than the image."""
    return (image_size // reduction // window) ** 2 if image_size in _PUBLISHED_SIZES else 1
