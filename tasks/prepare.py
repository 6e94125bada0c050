"""Stage `prepare`: decodes any source into three files of uint8 tensors, and describes them in JSON files."""

import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Prepare, Settings
from tasks.data import image_decoding, parallel_decoding, sources, split_writer, splitting
from tasks.data.image_decoding import Decoded
from tasks.data.samples import Sample, Source, labels

_MAX_LISTED = 5  # images in a message


def run(settings: Settings, paths: Paths, threads: int = parallel_decoding.THREADS) -> dict[str, Any]:
    """Prepare the source of the settings and return the manifest.

    The files are replaced together at the end; an error or interruption before that leaves the previous ones unchanged.
    The same source, settings and seed give the same bytes, whatever the number of threads.

    Raises:
        UserError: the source is missing, damaged or unsafe to read, or its images are not as the settings require.
    """
    prepare = settings.prepare
    with sources.open_source(prepare, paths.root, _rng(settings, 0)) as source, _scratch(paths) as scratch:
        splits = _select(source, settings)
        files = {name: scratch / f"{name}.safetensors" for name in splits}
        tally = _Tally()
        written = {}
        with tqdm(total=sum(map(len, splits.values())), desc="decoding", unit=" images", disable=None) as progress:
            for name, samples in splits.items():
                with closing(_decoded(samples, prepare, threads)) as decoded:
                    rows = _usable(name, samples, decoded, source, prepare, tally, progress)
                    size, max_rows = prepare.image_size, len(samples)
                    written[name] = split_writer.write(files[name], rows, size=size, max_rows=max_rows)
        _check(tally, written, prepare)
        manifest = _manifest(source, prepare, tally, written, files)
        write_text(scratch / paths.names.name, json.dumps(tally.names) + "\n")
        write_text(scratch / paths.quarantine.name, json.dumps(tally.quarantine, indent=2) + "\n")
        write_text(scratch / paths.manifest.name, json.dumps(manifest, indent=2) + "\n")
        # The manifest last, since its hash describes the other files.
        for file in (*files.values(), paths.names, paths.quarantine, paths.manifest):
            (scratch / file.name).replace(paths.prepared / file.name)
    counts = ", ".join(f"{len(split_labels)} {name}" for name, split_labels in written.items())
    changes = ", ".join(f"{count} {change.replace('_', ' ')}" for change, count in tally.converted.items() if count)
    print(
        f"prepared {prepare.source}: {counts} images of {len(source.classes)} classes, {prepare.image_size} pixels"
        f"{f' (converted: {changes})' if changes else ''} -> {paths.prepared}"
    )
    if tally.quarantine:
        print(f"quarantined {len(tally.quarantine)} unusable images, listed in {paths.quarantine}")
    return manifest


def _decoded(samples: list[Sample], prepare: Prepare, threads: int) -> Generator[Decoded | str, None, None]:
    return parallel_decoding.decode_in_order(samples, prepare.image_size, threads, prepare.fit)


def _rng(settings: Settings, purpose: int) -> np.random.Generator:
    """A separate random stream per purpose, so that changing one selection does not change the others."""
    return np.random.default_rng([settings.seed, purpose])


@contextmanager
def _scratch(paths: Paths) -> Iterator[Path]:
    """A folder for unfinished results, beside the finished ones; leftovers of a killed run are deleted."""
    folder = paths.prepared / ".unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _select(source: Source, settings: Settings) -> dict[str, list[Sample]]:
    """The samples of each split: the validation split is taken from the training images, then the limits apply."""
    prepare = settings.prepare
    train, validation = splitting.hold_out(labels(source.train), prepare.validation_fraction, _rng(settings, 1))
    splits = {
        "train": [source.train[i] for i in train],
        "validation": [source.train[i] for i in validation],
        "test": source.test,
    }
    present = {sample.label for sample in splits["train"]}
    too_small = [name for label, name in enumerate(source.classes) if label not in present]
    if too_small:
        raise UserError(
            f"{prepare.path}: too few images of {', '.join(too_small)}: the validation split takes at least one of "
            "each class (prepare.validation_fraction), so does a test split taken from the same images, and at least "
            "one must remain for training. Add images or remove the class."
        )
    limits = {"train": (prepare.train_per_class, 2), "test": (prepare.test_per_class, 3)}
    for name, (limit, purpose) in limits.items():
        if limit is not None:
            selected = splitting.limit_per_class(labels(splits[name]), limit, _rng(settings, purpose))
            splits[name] = [splits[name][i] for i in selected]
    return splits


@dataclass
class _Tally:
    """Which samples were written, converted or quarantined."""

    names: dict[str, list[str]] = field(default_factory=dict)  # of the written images, by split
    converted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(image_decoding.CHANGES, 0))
    quarantine: list[dict[str, str]] = field(default_factory=list)  # name, split, class and reason
    mismatched: int = 0  # quarantined because of prepare.on_mismatch


def _usable(
    split: str,
    samples: list[Sample],
    decoded: Iterator[Decoded | str],
    source: Source,
    prepare: Prepare,
    tally: _Tally,
    progress: "tqdm[Any]",
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Pixels and labels of the usable samples; every sample is recorded in the tally."""
    names = tally.names.setdefault(split, [])
    for sample, image in zip(samples, decoded, strict=True):
        progress.update()
        if isinstance(image, Decoded):
            mismatches = image_decoding.MISMATCHES.intersection(image.changes) - ({"grey"} if source.grey else set())
            if prepare.on_mismatch == "convert" or not mismatches:
                names.append(sample.name)
                for change in image.changes:
                    tally.converted[change] += 1
                yield image.pixels, sample.label
                continue
            tally.mismatched += 1
            reason = f"{image.original}, not RGB of {prepare.image_size} x {prepare.image_size} pixels"
        else:
            reason = image
        tally.quarantine.append(
            {"name": sample.name, "split": split, "class": source.classes[sample.label], "reason": reason}
        )


def _check(tally: _Tally, written: Mapping[str, splitting.Index], prepare: Prepare) -> None:
    """Raise UserError for unusable images, unless they may be quarantined and every split has others."""
    unusable = [f"{entry['name']} ({entry['reason']})" for entry in tally.quarantine]
    if unusable and prepare.on_bad_image == "refuse":
        count = f"{len(unusable)} images cannot be used: " if len(unusable) > 1 else ""
        listed = ", ".join(unusable[:_MAX_LISTED]) + (", ..." if len(unusable) > _MAX_LISTED else "")
        raise UserError(
            f"{count}{listed}{'' if count else ' cannot be used'}. Replace or remove them, or set prepare.on_bad_image "
            "(params.yaml) to 'quarantine' to go on without them."
            + (" prepare.on_mismatch 'convert' accepts grey images and other sizes." if tally.mismatched else "")
        )
    for name, split_labels in written.items():
        if not len(split_labels):
            raise UserError(f"{prepare.path}: no image of the {name} split can be used, for example {unusable[0]}.")


def _manifest(
    source: Source,
    prepare: Prepare,
    tally: _Tally,
    written: Mapping[str, splitting.Index],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    quarantined = [entry["split"] for entry in tally.quarantine]
    return {
        "source": prepare.source,
        "path": None if prepare.source == "digits" else prepare.path,
        "classes": source.classes,
        "image_size": prepare.image_size,
        "channels": 3,
        "splits": {
            name: {
                "images": len(split_labels),
                "per_class": np.bincount(split_labels, minlength=len(source.classes)).tolist(),
                "quarantined": quarantined.count(name),
            }
            for name, split_labels in written.items()
        },
        "hash": split_writer.content_hash(files),
        "converted": tally.converted,
    }


if __name__ == "__main__":
    entry_point.main(run)
