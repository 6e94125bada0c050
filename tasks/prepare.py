"""Stage 1: any source to three files of uint8 tensors and a manifest that says what they hold."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from d2r_core.data import Split, content_hash, save_split
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks import images, sampling, sources, stage
from tasks.paths import Paths
from tasks.settings import Prepare, Settings
from tasks.sources import Sample, Source

_SHOWN = 5  # files that a message names


def run(settings: Settings, paths: Paths) -> dict[str, Any]:
    """Prepare the source that the settings name and return the manifest.

    The files appear together at the end; an error or an interrupt before leaves the previous ones as they are. The
    same source, settings and seed give the same bytes.

    Raises:
        UserError: the source is missing or damaged, or its images are not as the settings allow.
    """
    prepare = settings.prepare
    with sources.opened(prepare, paths.root, _rng(settings, 0)) as source:
        splits, converted = _decode(_choose(source, settings), prepare)
    manifest = {
        "source": prepare.source,
        "path": None if prepare.source == "digits" else prepare.path,
        "classes": source.classes,
        "image_size": prepare.image_size,
        "channels": 3,
        "splits": {
            name: {"images": len(split), "per_class": split.labels.bincount(minlength=len(source.classes)).tolist()}
            for name, split in splits.items()
        },
        "hash": content_hash(splits),
        "converted": converted,
    }
    _write(splits, manifest, paths)
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    changes = ", ".join(f"{count} {change.replace('_', ' ')}" for change, count in converted.items() if count)
    print(
        f"prepared {prepare.source}: {counts} images of {len(source.classes)} classes, {prepare.image_size} pixels"
        f"{f' (converted: {changes})' if changes else ''} -> {paths.prepared}"
    )
    return manifest


def _rng(settings: Settings, purpose: int) -> np.random.Generator:
    """A stream of its own for each choice, so that a change of one does not move the others."""
    return np.random.default_rng([settings.seed, purpose])


def _choose(source: Source, settings: Settings) -> dict[str, list[Sample]]:
    """The samples of each split: the validation split is cut from the training images, then the limits apply."""
    prepare = settings.prepare
    kept, held = sampling.hold_out(_labels(source.train), prepare.validation_fraction, _rng(settings, 1))
    splits = {
        "train": [source.train[i] for i in kept],
        "validation": [source.train[i] for i in held],
        "test": source.test,
    }
    present = {sample.label for sample in splits["train"]}
    lonely = [name for label, name in enumerate(source.classes) if label not in present]
    if lonely:
        raise UserError(
            f"{prepare.path}: one training image only of {', '.join(lonely)}; two are needed, since the validation "
            "split (prepare.validation_fraction) takes at least one of each class. Add images or remove the class."
        )
    limits = {"train": (prepare.train_per_class, 2), "test": (prepare.test_per_class, 3)}
    for name, (limit, purpose) in limits.items():
        if limit is not None:
            chosen = sampling.at_most(_labels(splits[name]), limit, _rng(settings, purpose))
            splits[name] = [splits[name][i] for i in chosen]
    return splits


def _labels(samples: list[Sample]) -> sampling.Index:
    return np.array([sample.label for sample in samples], dtype=np.int64)


def _decode(chosen: Mapping[str, list[Sample]], prepare: Prepare) -> tuple[dict[str, Split], dict[str, int]]:
    """Decode every sample; returns the splits and how many images were converted, by kind of change."""
    size = prepare.image_size
    splits = {}
    converted = dict.fromkeys(images.CHANGES, 0)
    unreadable, mismatched = [], []
    with tqdm(total=sum(map(len, chosen.values())), desc="decoding", unit=" images", disable=None) as progress:
        for name, samples in chosen.items():
            pixels = np.zeros((len(samples), 3, size, size), dtype=np.uint8)
            for row, sample in enumerate(samples):
                try:
                    with sample.open() as image:
                        decoded = images.decode(image, size)
                except Exception as error:  # decoders meet damaged files with errors of every kind
                    unreadable.append(f"{sample.name} ({images.reason(error)})")
                else:
                    pixels[row] = decoded.pixels
                    for change in decoded.changes:
                        converted[change] += 1
                    if decoded.changes:
                        mismatched.append(f"{sample.name} ({decoded.found})")
                progress.update()
            splits[name] = Split(torch.from_numpy(pixels), torch.from_numpy(_labels(samples)))
    if unreadable:
        raise UserError(
            f"{_first(unreadable)} cannot be read as {'an image' if len(unreadable) == 1 else 'images'}. "
            "Replace or remove what is damaged."
        )
    if mismatched and prepare.on_mismatch == "refuse":
        raise UserError(
            f"{_first(mismatched)}: not RGB of {size} x {size} pixels, and prepare.on_mismatch (params.yaml) is "
            "'refuse'. Convert by hand, or set it to 'convert'."
        )
    return splits, converted


def _first(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    if len(names) == 1:
        return names[0]
    return f"{len(names)} files, {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"


def _write(splits: Mapping[str, Split], manifest: dict[str, Any], paths: Paths) -> None:
    """Write everything beside its place first, then rename; the manifest last, since its hash vouches for the rest."""
    paths.prepared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.prepared.parent, prefix=".prepared.") as folder:
        scratch = Path(folder)
        for name, split in splits.items():
            save_split(scratch / f"{name}.safetensors", split)
        write_text(scratch / paths.manifest.name, json.dumps(manifest, indent=2) + "\n")
        for name in splits:
            (scratch / f"{name}.safetensors").replace(paths.prepared / f"{name}.safetensors")
        (scratch / paths.manifest.name).replace(paths.manifest)


if __name__ == "__main__":
    stage.main(run)
