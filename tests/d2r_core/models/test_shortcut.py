"""No model of ours makes the call that corrupts the heap on CPUs without AVX-512 (oneDNN issue 6035)."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# 2, 4 and 6 channels into a strided 1 x 1 convolution, channels last, with gradients of the weights.
TRAIN = """
import torch
from d2r_core import models

torch.set_num_threads(1)
for width in (2, 4, 6):
    model = models.build("resnet18", num_classes=10, image_size=16, width=width, strides=(2, 2, 2, 2))
    model.to(memory_format=torch.channels_last)
    for _ in range(10):
        images = torch.rand(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        model(images).sum().backward()
print("done")
"""


@pytest.mark.skipif(not find_library("c_malloc_debug"), reason="glibc's checking malloc is not installed")
def test_training_stays_within_its_memory_without_avx512() -> None:
    child = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=ROOT,
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "LD_PRELOAD": "libc_malloc_debug.so.0",
            "GLIBC_TUNABLES": "glibc.malloc.check=3",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == "done\n"
