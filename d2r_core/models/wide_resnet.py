"""Wide residual network (Zagoruyko & Komodakis 2016), in the form of adversarial training (TRADES, LBGAT, D2R)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.pooling import pool, pooled_positions
from d2r_core.models.shortcut import Conv1x1
from d2r_core.models.winograd import Conv3x3


class _Block(nn.Module):
    """Pre-activation block; where the width changes, the shortcut starts from the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = Conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = Conv3x3(planes, planes)
        self.convShortcut = None if in_planes == planes else Conv1x1(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class _Stage(nn.Module):
    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(_Block(planes if i else in_planes, planes, 1 if i else stride) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WideResNet-`depth`-`widen_factor`; images (B, 3, H, W) in [0, 1] -> logits (B, num_classes).

    State-dict names are the published ones. `depth` must be 6 n + 4.
    """

    window = 8  # of the published average pooling

    def __init__(self, *, num_classes: int, image_size: int, depth: int, widen_factor: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, f"depth {depth} is not 6 n + 4"
        blocks = (depth - 4) // 6
        planes = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, planes[0], 3, 1, 1, bias=False)
        self.block1 = _Stage(blocks, planes[0], planes[1], 1)
        self.block2 = _Stage(blocks, planes[1], planes[2], 2)
        self.block3 = _Stage(blocks, planes[2], planes[3], 2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3] * pooled_positions(image_size, 4, self.window), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pool(F.relu(self.bn1(x), inplace=True), self.image_size, self.window))
