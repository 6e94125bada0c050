"""Small real images on the disk, and the settings to prepare them with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import yaml
from PIL import Image

from d2r_core.data import Split, load_split
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings

PROJECT = Path(__file__).parents[1]
SHARED = PROJECT.parent / "shared/data"


def settings(*, seed: int = 0, **values: Any) -> Settings:
    """The project's settings with some of `prepare` replaced."""
    params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["seed"] = seed
    params["prepare"] |= {"source": "image_folder", "path": "photos", "image_size": 16} | values
    return settings_file.parse(params)


def photo(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def make_folder(root: Path, train: int = 6, test: int = 3) -> Path:
    """root/photos with the classes cat and dog."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(1000 * label + 100 * (split == "test") + i).save(folder / f"{i:02}.png")
    return root / "photos"


def pack(folder: Path, archive: Path, members: Callable[[str], bool] = lambda name: True) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(archive, "w") as target:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            if members(name := file.relative_to(folder).as_posix()):
                target.write(file, name)


def load(paths: Paths) -> dict[str, Split]:
    return {name: load_split(paths.prepared / f"{name}.safetensors") for name in ("train", "validation", "test")}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file, and every folder, below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
