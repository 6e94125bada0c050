"""Stage 1: any source to three files of uint8 tensors, and files that say what they hold and what they do not."""

import json
import shutil
from collections.abc import Iterator, Mapping
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

_SHOWN = 5  # files that a message names


def run(settings: Settings, paths: Paths, threads: int = parallel_decoding.THREADS) -> dict[str, Any]:
    """Prepare the source that the settings name and return the manifest.

    The files appear together at the end; an error or an interrupt before leaves the previous ones as they are. The
    same source, settings and seed give the same bytes, whatever the number of threads.

    Raises:
        UserError: the source is missing, damaged or not to be trusted, or its images are not as the settings allow.
    """
    prepare = settings.prepare
    with sources.opened(prepare, paths.root, _rng(settings, 0)) as source, _scratch(paths) as scratch:
        chosen = _choose(source, settings)
        files = {name: scratch / f"{name}.safetensors" for name in chosen}
        tally = _Tally()
        written = {}
        with tqdm(total=sum(map(len, chosen.values())), desc="decoding", unit=" images", disable=None) as progress:
            for name, samples in chosen.items():
                with closing(parallel_decoding.in_order(samples, prepare.image_size, threads)) as outcomes:
                    rows = _usable(name, samples, outcomes, source, prepare, tally, progress)
                    written[name] = split_writer.write(files[name], rows, size=prepare.image_size, most=len(samples))
        _check(tally, written, prepare)
        manifest = _manifest(source, prepare, tally, written, files)
        write_text(scratch / paths.names.name, json.dumps(tally.names) + "\n")
        write_text(scratch / paths.quarantine.name, json.dumps(tally.quarantine, indent=2) + "\n")
        write_text(scratch / paths.manifest.name, json.dumps(manifest, indent=2) + "\n")
        # The manifest last, since its hash vouches for the rest.
        for file in (*files.values(), paths.names, paths.quarantine, paths.manifest):
            (scratch / file.name).replace(paths.prepared / file.name)
    counts = ", ".join(f"{len(found)} {name}" for name, found in written.items())
    changes = ", ".join(f"{count} {change.replace('_', ' ')}" for change, count in tally.converted.items() if count)
    print(
        f"prepared {prepare.source}: {counts} images of {len(source.classes)} classes, {prepare.image_size} pixels"
        f"{f' (converted: {changes})' if changes else ''} -> {paths.prepared}"
    )
    if tally.quarantine:
        print(f"set aside: {len(tally.quarantine)} images that cannot be used, listed in {paths.quarantine}")
    return manifest


def _rng(settings: Settings, purpose: int) -> np.random.Generator:
    """A stream of its own for each choice, so that a change of one does not move the others."""
    return np.random.default_rng([settings.seed, purpose])


@contextmanager
def _scratch(paths: Paths) -> Iterator[Path]:
    """A folder beside the results for those that are not finished. What a killed run left there is gone."""
    folder = paths.prepared / ".unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _choose(source: Source, settings: Settings) -> dict[str, list[Sample]]:
    """The samples of each split: the validation split is cut from the training images, then the limits apply."""
    prepare = settings.prepare
    kept, held = splitting.hold_out(labels(source.train), prepare.validation_fraction, _rng(settings, 1))
    splits = {
        "train": [source.train[i] for i in kept],
        "validation": [source.train[i] for i in held],
        "test": source.test,
    }
    present = {sample.label for sample in splits["train"]}
    lonely = [name for label, name in enumerate(source.classes) if label not in present]
    if lonely:
        raise UserError(
            f"{prepare.path}: too few images of {', '.join(lonely)}: the validation split takes at least one of each "
            "class (prepare.validation_fraction), so does a test split that has to be cut, and one must be left to "
            "train on. Add images or remove the class."
        )
    limits = {"train": (prepare.train_per_class, 2), "test": (prepare.test_per_class, 3)}
    for name, (limit, purpose) in limits.items():
        if limit is not None:
            chosen = splitting.at_most(labels(splits[name]), limit, _rng(settings, purpose))
            splits[name] = [splits[name][i] for i in chosen]
    return splits


@dataclass
class _Tally:
    """What became of the samples."""

    names: dict[str, list[str]] = field(default_factory=dict)  # of the images that are written, by split
    converted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(image_decoding.CHANGES, 0))
    quarantine: list[dict[str, str]] = field(default_factory=list)  # name, split, class and reason
    mismatched: int = 0  # in quarantine because of prepare.on_mismatch


def _usable(
    split: str,
    samples: list[Sample],
    outcomes: Iterator[Decoded | str],
    source: Source,
    prepare: Prepare,
    tally: _Tally,
    progress: "tqdm[Any]",
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Pixels and label of the samples that can be used; all of them go into the tally."""
    names = tally.names.setdefault(split, [])
    for sample, outcome in zip(samples, outcomes, strict=True):
        progress.update()
        if isinstance(outcome, Decoded):
            unwanted = set(outcome.changes) - ({"grey"} if source.grey else set())
            if prepare.on_mismatch == "convert" or not unwanted:
                names.append(sample.name)
                for change in outcome.changes:
                    tally.converted[change] += 1
                yield outcome.pixels, sample.label
                continue
            tally.mismatched += 1
            reason = f"{outcome.found}, not RGB of {prepare.image_size} x {prepare.image_size} pixels"
        else:
            reason = outcome
        tally.quarantine.append(
            {"name": sample.name, "split": split, "class": source.classes[sample.label], "reason": reason}
        )


def _check(tally: _Tally, written: Mapping[str, splitting.Index], prepare: Prepare) -> None:
    """Refuse images that cannot be used, unless they may be set aside and some are left."""
    bad = [f"{entry['name']} ({entry['reason']})" for entry in tally.quarantine]
    if bad and prepare.on_bad_image == "refuse":
        count = f"{len(bad)} images cannot be used: " if len(bad) > 1 else ""
        shown = ", ".join(bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
        raise UserError(
            f"{count}{shown}{'' if count else ' cannot be used'}. Replace or remove what is damaged, or set "
            "prepare.on_bad_image (params.yaml) to 'quarantine' to go on without it."
            + (" prepare.on_mismatch 'convert' takes grey and odd-sized images." if tally.mismatched else "")
        )
    for name, found in written.items():
        if not len(found):
            raise UserError(f"{prepare.path}: no image of the {name} split can be used, for example {bad[0]}.")


def _manifest(
    source: Source,
    prepare: Prepare,
    tally: _Tally,
    written: Mapping[str, splitting.Index],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    set_aside = [entry["split"] for entry in tally.quarantine]
    return {
        "source": prepare.source,
        "path": None if prepare.source == "digits" else prepare.path,
        "classes": source.classes,
        "image_size": prepare.image_size,
        "channels": 3,
        "splits": {
            name: {
                "images": len(found),
                "per_class": np.bincount(found, minlength=len(source.classes)).tolist(),
                "quarantined": set_aside.count(name),
            }
            for name, found in written.items()
        },
        "hash": split_writer.content_hash(files),
        "converted": tally.converted,
    }


if __name__ == "__main__":
    entry_point.main(run)
