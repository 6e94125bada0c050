"""Devices."""

import pytest
import torch

from d2r_core import runtime
from d2r_core.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_one_clear_message() -> None:
    with pytest.raises(UserError, match=r"runtime\.device is 'cuda', but PyTorch sees no GPU here"):
        runtime.device("cuda")
