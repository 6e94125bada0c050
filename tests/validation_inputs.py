"""Prepared data with known faults, for the tests of the stage `validate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photos import load, settings
from PIL import Image
from project import params, settings_from

from d2r_core.data import Split, content_hash, save_split
from tasks import prepare
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.validation.great_expectations_runner import Finding

Change = Callable[[dict[str, Split]], None]  # modifies the splits in place


def limits(**values: Any) -> Settings:
    """The project's settings with these values of `validate`; by default digits may resemble each other."""
    return settings_from(params(), validate={"max_near_duplicates": 1000, "max_repeated_images": 1000} | values)


def picture_limits(**values: Any) -> Settings:
    """The same for the few images of `make_pictures`, none of which may resemble another."""
    strict = {"max_near_duplicates": 0, "max_repeated_images": 0}
    return limits(**{"min_images_per_class": 1} | strict | values)


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def picture(seed: int, side: int = 32) -> Image.Image:
    """An image with structure, unlike noise: large soft spots, and smaller ones with less contrast, as in photos."""
    rng = np.random.default_rng(seed)
    total = np.full((side, side, 3), 128.0)
    for spots, contrast in ((4, 160.0), (8, 80.0), (16, 40.0)):
        coarse = Image.fromarray(rng.integers(0, 256, (spots, spots, 3), dtype=np.uint8))
        total += contrast * (np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def make_pictures(root: Path) -> Path:
    """root/photos/{train,test}/{cat,dog}: 6 and 3 pictures of each class, 32 x 32 pixels."""
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(1000 * label + 100 * (split == "test") + i).save(folder / f"{i:02}.png")
    return root / "photos"


def prepare_pictures(root: Path) -> Paths:
    prepare.run(settings(image_size=32), Paths(root))
    return Paths(root)


def modify(paths: Paths, change: Change) -> None:
    """Change the prepared tensors, and manifest and names accordingly, as if they had been prepared that way."""
    splits = load(paths)
    change(splits)
    manifest = json.loads(paths.manifest.read_text(encoding="utf-8"))
    classes = len(manifest["classes"])
    for name, split in splits.items():
        save_split(paths.prepared / f"{name}.safetensors", split)
        valid = split.labels[(split.labels >= 0) & (split.labels < classes)]
        counts = valid.bincount(minlength=classes).tolist()
        manifest["splits"][name] = {"images": len(split), "per_class": counts}
    names = {name: [f"{name}[{index}]" for index in range(len(split))] for name, split in splits.items()}
    paths.names.write_text(json.dumps(names), encoding="utf-8")
    manifest["hash"] = content_hash(splits)
    paths.manifest.write_text(json.dumps(manifest), encoding="utf-8")
