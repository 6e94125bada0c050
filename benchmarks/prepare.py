"""Throughput of the stage `prepare` beside the simplest loop: `python benchmarks/prepare.py [FOLDER] [--repeats N]`.

FOLDER contains cifar10-*.zip (train/<class>/<image>) and tiny-imagenet-200-subset.zip (the original layout); default:
../shared/data. The table goes to stdout. The variants take turns and the figures are medians, since other processes may
use the machine.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

from tasks import prepare
from tasks.config import settings
from tasks.config.paths import Paths
from tasks.data import parallel_decoding

ROOT = Path(__file__).parents[1]
SUFFIXES = (".webp", ".JPEG")


def plain_loop(archives: list[Path]) -> int:
    """Decode every image of the archives into memory in one loop, without checking, hashing or writing anything."""
    images = []
    for path in archives:
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(SUFFIXES):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return len(np.stack(images))


def run_stage(source: str, path: Path, image_size: int, threads: int) -> int:
    """The whole stage: decode, check, write and hash."""
    values = settings.load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["prepare"] |= {"source": source, "path": str(path), "image_size": image_size}
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        manifest = prepare.run(settings.parse(values), Paths(Path(root)), threads)
    return sum(split["images"] for split in manifest["splits"].values())


def throughput(work: Callable[[], int]) -> float:
    """Images per second."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    cifar, tiny = sorted(folder.glob("cifar10-*.zip")), folder / "tiny-imagenet-200-subset.zip"
    with tempfile.TemporaryDirectory() as scratch:
        for archive in cifar:
            Path(scratch, archive.name).symlink_to(archive)
        variants: dict[str, dict[str, Callable[[], int]]] = {
            "CIFAR-10, 60000 WebP, 32 px": {"plain loop": lambda: plain_loop(cifar)},
            "Tiny ImageNet, 10000 JPEG, 64 px": {"plain loop": lambda: plain_loop([tiny])},
        }
        for threads in sorted({1, 2, parallel_decoding.THREADS}):
            name = f"prepare, {threads} thread{'s' if threads > 1 else ''}"
            for variant, source, path, size in zip(
                variants.values(), ("image_folder", "tiny_imagenet"), (Path(scratch), tiny), (32, 64), strict=True
            ):
                variant[name] = lambda s=source, p=path, z=size, t=threads: run_stage(s, p, z, t)  # type: ignore[misc]
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {arguments.repeats}\n")
        print("| images | variant | images/s | min to max |\n|---|---|---|---|")
        for images, variant in variants.items():
            rates: dict[str, list[float]] = {name: [] for name in variant}
            for _ in range(arguments.repeats):
                for name, work in variant.items():
                    rates[name].append(throughput(work))
            for name, measured in rates.items():
                median = statistics.median(measured)
                print(f"| {images} | {name} | {median:.0f} | {min(measured):.0f} to {max(measured):.0f} |", flush=True)


if __name__ == "__main__":
    main()
