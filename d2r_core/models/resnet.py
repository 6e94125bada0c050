"""ResNet-18 (He et al. 2015) in its form for small images: the guidance model."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.shortcut import Conv1x1
from d2r_core.models.winograd import Conv3x3


class _Block(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = Conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(Conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(residual + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes); state-dict names as published, pooling global.

    Args:
        width: channels of the first stage, doubled at each later one; 64 as published.
        strides: of the four stages; (1, 1, 2, 2) as published at 32 pixels, (1, 2, 2, 2) at 64.
    """

    def __init__(self, *, num_classes: int, image_size: int, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        del image_size  # global pooling takes any size
        planes = [width, width, 2 * width, 4 * width, 8 * width]
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(_Block(planes[i], planes[i + 1], strides[i]), _Block(planes[i + 1], planes[i + 1], 1))
            for i in range(4)
        )
        self.linear = nn.Linear(planes[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))
