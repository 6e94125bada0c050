"""How fast the stage `prepare` is, beside the plainest loop: `python benchmarks/prepare.py [FOLDER] [--repeats N]`.

FOLDER holds cifar10-*.zip (train/<class>/<image>) and tiny-imagenet-200-subset.zip (the original layout); default:
../shared/data. The table goes to stdout. The ways take turns and the figures are medians, since a shared machine is
never quiet.
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


def plain(archives: list[Path]) -> int:
    """Decode every image of the archives in one loop and keep them in memory; nothing is checked, hashed or written."""
    images = []
    for path in archives:
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(SUFFIXES):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return len(np.stack(images))


def staged(source: str, path: Path, image_size: int, threads: int) -> int:
    """The whole stage: decoded, checked, written and hashed."""
    values = settings.load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["prepare"] |= {"source": source, "path": str(path), "image_size": image_size}
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        manifest = prepare.run(settings.parse(values), Paths(Path(root)), threads)
    return sum(split["images"] for split in manifest["splits"].values())


def rate(work: Callable[[], int]) -> float:
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
        ways: dict[str, dict[str, Callable[[], int]]] = {
            "CIFAR-10, 60000 WebP, 32 px": {"plain loop": lambda: plain(cifar)},
            "Tiny ImageNet, 10000 JPEG, 64 px": {"plain loop": lambda: plain([tiny])},
        }
        for threads in sorted({1, 2, parallel_decoding.THREADS}):
            name = f"prepare, {threads} thread{'s' if threads > 1 else ''}"
            for way, source, path, size in zip(
                ways.values(), ("image_folder", "tiny_imagenet"), (Path(scratch), tiny), (32, 64), strict=True
            ):
                way[name] = lambda s=source, p=path, z=size, t=threads: staged(s, p, z, t)  # type: ignore[misc]
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {arguments.repeats}\n")
        print("| images | way | images/s | least to most |\n|---|---|---|---|")
        for images, way in ways.items():
            rates: dict[str, list[float]] = {name: [] for name in way}
            for _ in range(arguments.repeats):
                for name, work in way.items():
                    rates[name].append(rate(work))
            for name, found in rates.items():
                middle = statistics.median(found)
                print(f"| {images} | {name} | {middle:.0f} | {min(found):.0f} to {max(found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
