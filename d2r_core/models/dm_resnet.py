"""The two networks of DeepMind's robust models (Gowal et al. 2020), in which most later checkpoints are published.

They differ from wide_resnet.py and preact_resnet.py in their names, in the padding of strided convolutions, in the
activation, and the smaller one in its shortcuts.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.shortcut import Conv1x1
from d2r_core.models.winograd import Conv3x3

ActivationName = Literal["relu", "silu"]
_Activation = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[ActivationName, _Activation] = {"relu": F.relu, "silu": F.silu}


class _SameConv3x3(Conv3x3):
    """Padded as TensorFlow's "SAME": at stride 2, by a row below and a column on the right."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, stride=self.stride)


class _WideBlock(nn.Module):
    """Pre-activation block; where the width changes, the shortcut starts from the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: _Activation) -> None:
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        self.conv_0 = _SameConv3x3(in_planes, planes, stride)
        self.batchnorm_1 = nn.BatchNorm2d(planes)
        self.conv_1 = Conv3x3(planes, planes)
        self.shortcut = None if in_planes == planes else Conv1x1(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv_1(self.activation(self.batchnorm_1(self.conv_0(activated))))


class _WideStage(nn.Module):
    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int, activation: _Activation) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(_WideBlock(planes if i else in_planes, planes, 1 if i else stride, activation) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMWideResNet(nn.Module):
    """WideResNet-`depth`-`widen_factor`; normalised images (B, 3, H, W) -> logits (B, num_classes), pooling global.

    State-dict names are the published ones. `depth` must be 6 n + 4.
    """

    def __init__(self, *, num_classes: int, depth: int, widen_factor: int, activation: ActivationName) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, f"depth {depth} is not 6 n + 4"
        blocks, self.activation = (depth - 4) // 6, _ACTIVATIONS[activation]
        planes = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.init_conv = Conv3x3(3, planes[0])
        self.layer = nn.Sequential(
            *(_WideStage(blocks, planes[i], planes[i + 1], min(2, i + 1), self.activation) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(planes[3])
        self.logits = nn.Linear(planes[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv(x))
        return self.logits(self.activation(self.batchnorm(x)).mean((2, 3)))


class _PreActBlock(nn.Module):
    """Pre-activation block; where the shape changes, the shortcut is a 3 x 3 convolution of the input as it is."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: _Activation) -> None:
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        self.conv_2d_1 = _SameConv3x3(in_planes, planes, stride)
        self.batchnorm_1 = nn.BatchNorm2d(planes)
        self.conv_2d_2 = Conv3x3(planes, planes)
        changes = stride != 1 or in_planes != planes
        self.shortcut = _SameConv3x3(in_planes, planes, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        residual = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        return shortcut + self.conv_2d_2(self.activation(self.batchnorm_1(residual)))


class DMPreActResNet18(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, num_classes), pooling global; state-dict names as published."""

    def __init__(self, *, num_classes: int, activation: ActivationName) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        planes = [64, 64, 128, 256, 512]
        self.conv_2d = Conv3x3(3, planes[0])
        self.layer_0, self.layer_1, self.layer_2, self.layer_3 = (
            nn.Sequential(
                _PreActBlock(planes[i], planes[i + 1], min(2, i + 1), self.activation),
                _PreActBlock(planes[i + 1], planes[i + 1], 1, self.activation),
            )
            for i in range(4)
        )
        self.batchnorm = nn.BatchNorm2d(planes[4])
        self.logits = nn.Linear(planes[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
        return self.logits(self.activation(self.batchnorm(x)).mean((2, 3)))
