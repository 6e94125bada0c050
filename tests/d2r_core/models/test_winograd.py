"""Winograd's convolution agrees with the direct one, and serves only where it is faster."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.models.winograd import Conv3x3, winograd


@pytest.mark.parametrize(("batch", "shape"), [(3, (128, 160, 8, 12)), (70, (160, 128, 12, 8))])
def test_winograd_is_the_convolution_to_rounding_with_its_gradients(batch: int, shape: tuple[int, ...]) -> None:
    channels, filters, height, width = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    weight = torch.randn(filters, channels, 3, 3, requires_grad=True)
    upstream = torch.randn(batch, filters, height, width)

    def results(convolve: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        y = convolve(x.to(dtype), weight.to(dtype))
        return y, *torch.autograd.grad(y, (x, weight), upstream.to(dtype))

    exact = results(partial(F.conv2d, padding=1), torch.float64)
    for actual, expected in zip(results(winograd, torch.float32), exact, strict=True):
        assert (actual - expected).norm() < 5e-6 * expected.norm()


def test_winograd_serves_wide_fp32_convolutions_alone() -> None:
    torch.manual_seed(0)
    for channels, stride, dtype, faster in (
        (128, 1, torch.float32, True),
        (16, 1, torch.float32, False),
        (128, 2, torch.float32, False),
        (128, 1, torch.float64, False),
    ):
        layer = Conv3x3(channels, channels, stride).to(dtype)
        x = torch.randn(16, channels, 8, 8, dtype=dtype)
        direct = nn.Conv2d.forward(layer, x)
        assert torch.equal(layer(x), direct) != faster
        torch.testing.assert_close(layer(x), direct, rtol=1e-4, atol=1e-4)
