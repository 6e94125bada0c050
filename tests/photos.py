"""Small real images on disk, the settings to prepare them, and the result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from PIL import Image
from project import params, settings_from

from d2r_core.data import Split, load_split
from tasks.config.paths import Paths
from tasks.config.settings import Settings


def settings(*, seed: int = 0, **values: Any) -> Settings:
    """The project's settings, for the images of `make_folder`, with these values of `prepare`."""
    return settings_from(
        params(), seed=seed, prepare={"source": "image_folder", "path": "photos", "image_size": 16} | values
    )


def photo(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Random noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def make_folder(root: Path, train: int = 6, test: int = 3) -> Path:
    """root/photos with the classes cat and dog: `train` and `test` images of each."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(1000 * label + 100 * (split == "test") + i).save(folder / f"{i:02}.png")
    return root / "photos"


def pack(folder: Path, archive: Path, members: Callable[[str], bool] = lambda name: True) -> None:
    """Pack the images of a folder whose relative names satisfy `members` into a zip archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(archive, "w") as target:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            if members(name := file.relative_to(folder).as_posix()):
                target.write(file, name)


def load(paths: Paths) -> dict[str, Split]:
    """The prepared splits."""
    return {name: load_split(paths.prepared / f"{name}.safetensors") for name in ("train", "validation", "test")}


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
