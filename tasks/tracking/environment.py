"""Where a stage runs: what decides, besides code, data and settings, whether two runs give the same bits."""

import platform
import re
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from d2r_core import distributed, files
from tasks.config.paths import Paths

_PIN = r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)"  # a line of requirements.lock


class Environment(BaseModel):
    """The packages and the machine of a process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    torch: str
    numpy: str
    requirements_lock: str | None  # SHA-256 of requirements.lock; None: there is no such file
    cpu: str  # its model
    cpu_instructions: str  # that PyTorch's kernels use, such as AVX512
    gpu: str | None  # None: it was not used
    cuda: str | None
    threads: int
    processes: int
    precision: str


def current_environment(paths: Paths, device: torch.device, precision: str) -> Environment:
    """The environment of this process, as it computes on a device.

    Args:
        precision: "fp32", "tf32" or "bf16", as the settings say.
    """
    lock = paths.root / "requirements.lock"
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        numpy=np.__version__,
        requirements_lock=files.sha256(lock) if lock.is_file() else None,
        cpu=_cpu(),
        cpu_instructions=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        threads=torch.get_num_threads(),
        processes=distributed.world(),
        precision=precision,
    )


def locked_packages(lock: Path) -> dict[str, list[str]]:
    """The versions of each package in requirements.lock (several for several releases of Python); {} without it."""
    pins: dict[str, list[str]] = {}
    if lock.is_file():
        for name, version in re.findall(_PIN, lock.read_text(encoding="utf-8"), re.MULTILINE):
            pins.setdefault(name, []).append(version)
    return pins


def _cpu() -> str:
    info = Path("/proc/cpuinfo")  # Linux alone; `platform` knows no model there
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
