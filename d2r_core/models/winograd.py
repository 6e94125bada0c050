"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) of Lavin & Gray 2016: a quarter of the products.

A tile of 4 x 4 outputs depends on 6 x 6 inputs. Tiles, filters and products are transformed linearly; between the
transforms there are 36 matrix products over the channels. It agrees with the direct convolution to fp32 rounding.
cuDNN does this by itself on a GPU; PyTorch's convolutions on a CPU are direct.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIN_CHANNELS = 128  # with fewer the transforms cost more than they save
_MIN_TILES = 32  # in a batch: the filters are transformed at every call
_CHUNK = 256  # tiles at a time: enough to be worth transforming the filters, few enough to stay in the cache

_INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
_INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_FILTER = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # times 24
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _transform_2d(matrix: list[list[int]], scale: float = 1.0) -> Tensor:
    """The transform of a flattened square, rows and columns at once."""
    transform_1d = torch.tensor(matrix, dtype=torch.float64) / scale
    return torch.kron(transform_1d, transform_1d).float()


_B, _G, _A = _transform_2d(_INPUT), _transform_2d(_FILTER, 24.0), _transform_2d(_OUTPUT)  # (36, 36), (36, 9), (16, 36)
_ROWS = [slice(row, row + 12) for row in range(0, 36, 12)]  # products at a time: their filters stay in the cache


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with padding 1 and without bias, by Winograd's algorithm where that is faster."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return winograd(x, self.weight) if self.stride == (1, 1) and _is_faster(x, self.weight) else super().forward(x)


def winograd(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve images (B, C, H, W), H and W multiples of 4, with filters (K, C, 3, 3): padding 1, stride 1; fp32."""
    result: Tensor = _Winograd.apply(x, weight)
    return result


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    batch, _, height, width = x.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and height % 4 == width % 4 == 0
        and batch * height * width >= 16 * _MIN_TILES
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, mirrored=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        # The input's gradient is the output's, convolved with the mirrored filters.
        return (
            _convolve(gradient, weight, mirrored=True) if needs_x else None,
            _weight_gradient(x, gradient) if needs_weight else None,
        )


def _convolve(x: Tensor, weight: Tensor, *, mirrored: bool) -> Tensor:
    """Convolve images (B, C, H, W) with filters (K, C, 3, 3); `mirrored`: (B, K, H, W) with the mirrored filters."""
    taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
    if mirrored:
        taps = taps.flip(0)
    filters = weight.shape[1] if mirrored else weight.shape[0]
    result = torch.empty(x.shape[0], filters, *x.shape[2:], memory_format=torch.channels_last)
    for images, part in _chunks(x, result):
        inputs = _inputs(images)
        products = torch.empty(*inputs.shape[:2], filters)
        for rows in _ROWS:
            transformed = (_G[rows] @ taps).view(-1, *weight.shape[:2])
            torch.bmm(inputs[rows], transformed if mirrored else transformed.mT, out=products[rows])
        squares = _squares(part)
        squares.copy_((_A @ products.view(36, -1)).view(squares.shape))
    return result


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Images (B, C, H, W) and the output's gradient (B, K, H, W) -> the filters' gradient (K, C, 3, 3)."""
    channels, filters = x.shape[1], gradient.shape[1]
    taps = torch.zeros(9, filters * channels)
    for images, part in _chunks(x, gradient):
        inputs = _inputs(images)
        products = (_A.T @ _squares(part).reshape(16, -1)).view(36, -1, filters)
        for rows in _ROWS:
            taps.addmm_(_G[rows].T, torch.bmm(products[rows].transpose(1, 2), inputs[rows]).flatten(1))
    return taps.view(3, 3, filters, channels).permute(2, 3, 0, 1)


def _inputs(x: Tensor) -> Tensor:
    """Images (B, C, H, W) -> their transformed 6 x 6 tiles, one at every fourth pixel, (36, tiles, C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, pixel, channel = padded.stride()
    tiles = padded.as_strided((6, 6, *_grid(x), x.shape[1]), (row, pixel, image, 4 * row, 4 * pixel, channel))
    return (_B @ tiles.reshape(36, -1)).view(36, -1, x.shape[1])


def _squares(x: Tensor) -> Tensor:
    """A view of (B, C, H, W) as (4, 4, B, H / 4, W / 4, C): squares of 4 x 4 pixels."""
    return x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(3, 5, 0, 2, 4, 1)


def _grid(x: Tensor) -> tuple[int, int, int]:
    """Images, and rows and columns of squares in each."""
    return x.shape[0], x.shape[2] // 4, x.shape[3] // 4


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and outputs of the same few images."""
    _, height, width = _grid(x)
    size = max(1, _CHUNK // (height * width))
    return zip(x.split(size), y.split(size), strict=True)
