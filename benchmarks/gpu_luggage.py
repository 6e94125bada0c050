"""What a rented machine lacks, packed where the project is installed and read there: data, AutoAttack, the commit.

Each folder of the luggage fits one upload of 64 MiB, and together they are complete: .gpu/1, .gpu/2, ...
"""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # which torchvision brings along
from safetensors.torch import load_file, save_file

from d2r_core.data import Split, load_split, save_split
from d2r_core.errors import UserError
from d2r_core.files import write_text

ROOT = Path(__file__).parents[1]
LUGGAGE = ROOT / ".gpu"

_SPLITS = ("train", "validation", "test")
_FOLDER_BYTES = 56 * 2**20
_WEBP_PIXELS = 16383  # the most that a WebP image is high
# What the figures depend on: a commit that touches nothing else leaves them as they are.
_MEASURED = ("d2r_core", "benchmarks", "tasks/evaluation/autoattack.py", "tests/d2r_core/test_gpu.py")


def pack(folder: Path) -> None:
    """Write the luggage from a folder of prepared data.

    The images are stacked into columns and stored as lossless WebP, half the bytes that they take as tensors.
    """
    splits = data(folder)
    for old in (*LUGGAGE.glob("[0-9]*"), LUGGAGE / "prepared"):
        shutil.rmtree(old, ignore_errors=True)
    bag, used = LUGGAGE / "1", 0
    bag.mkdir(parents=True)
    for name, split in splits.items():
        step = _WEBP_PIXELS // split.images.shape[2]
        for start in range(0, len(split), step):
            rows = split.images[start : start + step].permute(0, 2, 3, 1)
            column = io.BytesIO()
            Image.fromarray(rows.flatten(0, 1).numpy()).save(column, "WEBP", lossless=True, exact=True)
            used += column.tell()
            if used > _FOLDER_BYTES:
                bag, used = LUGGAGE / str(int(bag.name) + 1), column.tell()
                bag.mkdir()
            (bag / f"{name}-{start:06}.webp").write_bytes(column.getvalue())
    save_file({name: split.labels for name, split in splits.items()}, LUGGAGE / "1/labels.safetensors")
    found = importlib.util.find_spec("pyautoattack")
    assert found is not None
    assert found.origin is not None
    for module in Path(found.origin).parent.glob("*.py"):
        (LUGGAGE / "1/pyautoattack").mkdir(exist_ok=True)
        shutil.copy(module, LUGGAGE / "1/pyautoattack")
    write_text(LUGGAGE / "1/commit", commit())
    folders = ", ".join(
        f"{path} ({sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 2**20:.0f} MiB)"
        for path in sorted(LUGGAGE.glob("[0-9]*"))
    )
    print(f"packed for the rented machine: {folders}")


def prepared(folder: Path) -> Path:
    """The folder of prepared data: this one, or the luggage's, unpacked. Raises UserError without either."""
    unpacked = LUGGAGE / "prepared"
    for found in (folder, unpacked):
        if all((found / f"{name}.safetensors").exists() for name in _SPLITS):
            return found
    if not (LUGGAGE / "1/labels.safetensors").exists():
        raise UserError(
            f"{folder}: holds no prepared data, and {LUGGAGE} does not either. Where the project is installed, "
            "prepare CIFAR-10 (`d2r use cifar10_preact_resnet18`, `d2r stage prepare`), run "
            "`benchmarks/gpu.sh --bring` and copy the folders of .gpu here."
        )
    for name, labels in load_file(LUGGAGE / "1/labels.safetensors").items():
        pieces = sorted(LUGGAGE.glob(f"*/{name}-*.webp"), key=lambda path: path.name)
        columns = [torch.from_numpy(np.array(Image.open(piece))) for piece in pieces]
        images = [column.unflatten(0, (-1, column.shape[1])).permute(0, 3, 1, 2) for column in columns]
        count = sum(map(len, images))
        if count != len(labels):
            raise UserError(
                f"{LUGGAGE}: has {count} of the {len(labels)} {name} images. Copy all of its folders: "
                "`benchmarks/gpu.sh --bring` names them."
            )
        save_split(unpacked / f"{name}.safetensors", Split(torch.cat(images), labels))
    return unpacked


def data(folder: Path) -> dict[str, Split]:
    """The splits of a folder of prepared data, by name."""
    return {name: load_split(folder / f"{name}.safetensors") for name in _SPLITS}


def provide_autoattack() -> None:
    """Make `pyautoattack` importable, from the luggage if it is not installed. Raises UserError without either."""
    if importlib.util.find_spec("pyautoattack"):
        return
    sys.path.append(str(LUGGAGE / "1"))
    importlib.invalidate_caches()
    if not importlib.util.find_spec("pyautoattack"):
        raise UserError(
            "pyautoattack is neither installed nor in .gpu/1. Run `benchmarks/gpu.sh --bring` where the project is "
            "installed and copy the folders of .gpu here; it is pure Python."
        )


def commit() -> str:
    """The last commit that could change a figure, and its date: "1a2b3c4 2026-11-22T19:05:00+00:00"."""
    brought, utc = LUGGAGE / "1/commit", {**os.environ, "TZ": "UTC"}
    try:
        last = ["git", "log", "-1", "--format=%h %cd", "--date=iso-strict-local", "--", *_MEASURED]
        changed = ["git", "status", "--porcelain", "--", *_MEASURED]
        found, dirty = (
            subprocess.run(command, cwd=ROOT, env=utc, capture_output=True, text=True, check=True).stdout.strip()
            for command in (last, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return brought.read_text(encoding="utf-8") if brought.exists() else "unknown 1970-01-01T00:00:00+00:00"
    return found.replace(" ", "+changes ", 1) if dirty else found
