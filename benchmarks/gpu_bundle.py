"""What a GPU machine lacks, packed where the project is installed and read there: data, AutoAttack, the commit.

Each folder of the bundle (.gpu/1, .gpu/2, ...) fits one upload of 64 MiB, and together they are complete.
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
from PIL import Image  # a dependency of torchvision
from safetensors.torch import load_file, save_file

from d2r_core.data import Split, load_split, save_split
from d2r_core.errors import UserError
from d2r_core.files import write_text

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".gpu"

_SPLITS = ("train", "validation", "test")
_FOLDER_BYTES = 56 * 2**20
_WEBP_PIXELS = 16383  # the largest height of a WebP image
# What the figures depend on: a commit that touches nothing else leaves them valid.
_MEASURED = ("d2r_core", "benchmarks", "tasks/evaluation/autoattack.py", "tests/d2r_core/test_gpu.py")


def pack(prepared: Path) -> None:
    """Write the bundle. The images become columns of lossless WebP, half the bytes that they take as tensors."""
    splits = cifar10(prepared)
    for old in (*FOLDER.glob("[0-9]*"), FOLDER / "prepared"):
        shutil.rmtree(old, ignore_errors=True)
    folder, used = FOLDER / "1", 0
    folder.mkdir(parents=True)
    for name, split in splits.items():
        step = _WEBP_PIXELS // split.images.shape[2]
        for start in range(0, len(split), step):
            rows = split.images[start : start + step].permute(0, 2, 3, 1)
            column = io.BytesIO()
            Image.fromarray(rows.flatten(0, 1).numpy()).save(column, "WEBP", lossless=True, exact=True)
            used += column.tell()
            if used > _FOLDER_BYTES:
                folder, used = FOLDER / str(int(folder.name) + 1), column.tell()
                folder.mkdir()
            (folder / f"{name}-{start:06}.webp").write_bytes(column.getvalue())
    save_file({name: split.labels for name, split in splits.items()}, FOLDER / "1/labels.safetensors")
    package = importlib.util.find_spec("pyautoattack")
    assert package is not None
    assert package.origin is not None
    (FOLDER / "1/pyautoattack").mkdir()
    for module in Path(package.origin).parent.glob("*.py"):
        shutil.copy(module, FOLDER / "1/pyautoattack")
    write_text(FOLDER / "1/commit", commit())
    print("packed: " + ", ".join(map(str, sorted(FOLDER.glob("[0-9]*")))))


def prepared_folder(prepared: Path) -> Path:
    """`prepared` if the stage has filled it, else the bundle's images, unpacked. Raises UserError without either."""
    for folder in (prepared, FOLDER / "prepared"):
        if all((folder / f"{name}.safetensors").exists() for name in _SPLITS):
            return folder
    _unpack(FOLDER / "prepared", prepared)
    return FOLDER / "prepared"


def cifar10(folder: Path) -> dict[str, Split]:
    """The splits of a folder of prepared data, by name. Raises UserError for other data: figures say CIFAR-10."""
    splits = {name: load_split(folder / f"{name}.safetensors") for name in _SPLITS}
    shape = tuple(splits["test"].images.shape)
    if shape != (10000, 3, 32, 32):
        raise UserError(
            f"{folder}: holds {shape[0]} test images of {shape[-1]} pixels, which is not CIFAR-10. "
            "`d2r use cifar10_preact_resnet18` and `d2r stage prepare` prepare it."
        )
    return splits


def _unpack(folder: Path, prepared: Path) -> None:
    if not (FOLDER / "1/labels.safetensors").exists():
        raise UserError(
            f"{prepared}: holds no prepared data, and {FOLDER} does not either. Where the project is installed, "
            "prepare CIFAR-10 (`d2r use cifar10_preact_resnet18`, `d2r stage prepare`), run "
            "`python benchmarks/gpu.py --pack` and copy the folders of .gpu here."
        )
    for name, labels in load_file(FOLDER / "1/labels.safetensors").items():
        pieces = sorted(FOLDER.glob(f"*/{name}-*.webp"), key=lambda path: path.name)
        columns = [torch.from_numpy(np.array(Image.open(piece))) for piece in pieces]
        images = [column.unflatten(0, (-1, column.shape[1])).permute(0, 3, 1, 2) for column in columns]
        count = sum(map(len, images))
        if count != len(labels):
            raise UserError(
                f"{FOLDER}: has {count} of the {len(labels)} {name} images. Copy all of its folders: "
                "`python benchmarks/gpu.py --pack` names them."
            )
        save_split(folder / f"{name}.safetensors", Split(torch.cat(images), labels))


def miniature() -> dict[str, Split]:
    """Four classes of 16 x 16 images, each a bright quarter in noise."""

    def split(seed: int, count: int) -> Split:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 160, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
        for place, label in enumerate(labels.tolist()):
            row, column = 8 * (label // 2), 8 * (label % 2)
            images[place, :, row : row + 8, column : column + 8] += 80
        return Split(images.to(torch.uint8), labels)

    return {"train": split(0, 128), "validation": split(1, 32), "test": split(2, 32)}


def provide_autoattack() -> None:
    """Make `pyautoattack` importable, from the bundle if it is not installed. Raises UserError without either."""
    if importlib.util.find_spec("pyautoattack"):
        return
    sys.path.append(str(FOLDER / "1"))
    importlib.invalidate_caches()
    if not importlib.util.find_spec("pyautoattack"):
        raise UserError(
            "pyautoattack is neither installed nor in .gpu/1. Run `python benchmarks/gpu.py --pack` where the project "
            "is installed and copy the folders of .gpu here; it is pure Python."
        )


def commit() -> str:
    """The last commit that could change a figure, and its date: "1a2b3c4 2026-11-22T19:05:00+00:00"."""
    packed, utc = FOLDER / "1/commit", {**os.environ, "TZ": "UTC"}
    try:
        last = ["git", "log", "-1", "--format=%h %cd", "--date=iso-strict-local", "--", *_MEASURED]
        changed = ["git", "status", "--porcelain", "--", *_MEASURED]
        stamp, dirty = (
            subprocess.run(command, cwd=ROOT, env=utc, capture_output=True, text=True, check=True).stdout.strip()
            for command in (last, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return packed.read_text(encoding="utf-8") if packed.exists() else "unknown 1970-01-01T00:00:00+00:00"
    return stamp.replace(" ", "+changes ", 1) if dirty else stamp
