"""PreActResNet-18 (He et al. 2016, "Identity mappings in deep residual networks") as published for CIFAR."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.pooling import pool, pooled_positions
from d2r_core.models.shortcut import Conv1x1
from d2r_core.models.winograd import Conv3x3

# Where a shortcut that changes the shape starts. Published networks differ in it, and their weights do not show it.
ShortcutStart = Literal["activated", "input"]


class _Block(nn.Module):
    """Pre-activation block."""

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut_from: ShortcutStart) -> None:
        super().__init__()
        self.shortcut_from = shortcut_from
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = Conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = Conv3x3(planes, planes)
        changes = stride != 1 or in_planes != planes
        self.shortcut = nn.Sequential(Conv1x1(in_planes, planes, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(activated if self.shortcut_from == "activated" else x)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class PreActResNet18(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes); state-dict names as published.

    Args:
        shortcut_from: where the shortcut of a block that changes the shape starts: at the activated input, or at the
            input itself.
        final_norm: BatchNorm and ReLU before the pooling, as in the original paper; most robust models lack them.
    """

    window = 4  # of the published average pooling

    def __init__(
        self, *, num_classes: int, image_size: int, shortcut_from: ShortcutStart = "activated", final_norm: bool = False
    ) -> None:
        super().__init__()
        self.image_size = image_size
        planes = [64, 64, 128, 256, 512]
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                _Block(planes[i], planes[i + 1], min(2, i + 1), shortcut_from),
                _Block(planes[i + 1], planes[i + 1], 1, shortcut_from),
            )
            for i in range(4)
        )
        self.bn = nn.BatchNorm2d(512) if final_norm else None
        self.linear = nn.Linear(512 * pooled_positions(image_size, 8, self.window), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            x = F.relu(self.bn(x), inplace=True)
        return self.linear(pool(x, self.image_size, self.window))
