"""PreActResNet-18 (He et al. 2016, "Identity mappings in deep residual networks") as published for CIFAR."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.pooling import pool, pooled_positions
from d2r_core.models.shortcut import Conv1x1
from d2r_core.models.winograd import Conv3x3


class _Block(nn.Module):
    """Pre-activation block; where the shape changes, the shortcut starts from the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = Conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = Conv3x3(planes, planes)
        changes = stride != 1 or in_planes != planes
        self.shortcut = nn.Sequential(Conv1x1(in_planes, planes, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class PreActResNet18(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes); state-dict names as published."""

    window = 4  # of the published average pooling

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))
        self.linear = nn.Linear(512 * pooled_positions(image_size, 8, self.window), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(pool(x, self.image_size, self.window))
