"""Images in class folders: `train/<class>/<image>` and `test/<class>/<image>`, or without a test split.

In a folder, a zip archive, or several archives merged.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from d2r_core.errors import UserError
from tasks.data import archive, image_decoding, samples
from tasks.data.archive import Entry
from tasks.data.samples import Sample, Source

SPLITS = ("train", "test")
_LAYOUT = "train/<class>/<image> and test/<class>/<image>, or <class>/<image> without a test split"
Found = dict[str, dict[str, list[Entry]]]  # split -> class -> entries, both sorted by name


@contextmanager
def opened(path: Path, test_fraction: float, rng: np.random.Generator) -> Iterator[Source]:
    """The classes are the sorted folder names; the samples can be opened while the context lasts.

    Args:
        test_fraction: of each class, drawn with `rng` as the test split where there is no test/.

    Raises:
        UserError: nothing is there, an archive is damaged or cannot be trusted, or the layout is another one.
    """
    with ExitStack() as stack:
        found = _arrange(path, [entry for place in _places(path) for entry in archive.opened(place, stack)])
        yield _source(path, found, test_fraction, rng)


@contextmanager
def opened_for_testing(path: Path) -> Iterator[Source]:
    """The same, for a model that was trained elsewhere: all images below test/ are its `test`, without splits all."""
    with ExitStack() as stack:
        entries = [entry for place in _places(path) for entry in archive.opened(place, stack)]
        if not any(entry.name.startswith("train/") for entry in entries):
            entries = [
                entry._replace(name=entry.name.removeprefix("test/")) for entry in entries if entry.name != "test/"
            ]
        found = _arrange(path, entries)
        yield Source(list(found["train"]), [], _samples(found.get("test", found["train"])))


def _places(path: Path) -> list[Path]:
    """The folder or archive itself, or the archives that it holds."""
    if not path.is_dir():
        return [path]
    children = sorted(child for child in path.iterdir() if not archive.hidden(child.name))
    archives = [child for child in children if child.suffix.lower() == ".zip" and child.is_file()]
    if archives and any(child.is_dir() for child in children):
        raise UserError(
            f"{path}: holds folders and archives ({archives[0].name}); keep one of the two, or let prepare.path "
            "(params.yaml) name the one to use."
        )
    return archives or [path]


def _arrange(path: Path, entries: list[Entry]) -> Found:
    """Sort the entries into splits and classes; every image must fit the layout."""
    tops = sorted({f"{entry.name.partition('/')[0]}/" for entry in entries if "/" in entry.name})
    splits = [split for split in SPLITS if f"{split}/" in tops]
    others = [top for top in tops if top.rstrip("/") not in SPLITS]
    if splits and (others or "train" not in splits):
        raise UserError(
            f"{path}: found {_some(tops)}; beside train/ only test/ can be. Rename or move the others. The layout is "
            f"{_LAYOUT}."
        )
    found: Found = {split: {} for split in splits or SPLITS[:1]}
    previous = None
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.shown)):
        if entry.read and previous and previous.name == entry.name:
            raise UserError(f"{entry.shown}: stands in {previous.shown} too. Rename or remove one of the two.")
        previous = entry
        parts = entry.name.rstrip("/").split("/")
        split, *below = parts if splits else ["train", *parts]
        match below:
            case [name] if not entry.read:
                found[split].setdefault(name, [])
            case [name, _] if entry.read:
                found[split].setdefault(name, []).append(entry)
            case _ if len(parts) == 1:
                pass  # the split's folder, or a file beside the folders, such as a licence
            case _:
                raise UserError(f"{entry.shown}: is out of place; the layout is {_LAYOUT}. Move or remove it.")
    _check(path, found, tops)
    return {split: dict(sorted(classes.items())) for split, classes in found.items()}


def _check(path: Path, found: Found, tops: list[str]) -> None:
    if not all(found.values()):
        raise UserError(f"{path}: no class folder; found {_some(tops)}. The layout is {_LAYOUT}.")
    empty = [f"{split}/{name}/" for split in found for name, files in sorted(found[split].items()) if not files]
    if empty:
        raise UserError(f"{path}: no image in {', '.join(empty)}. Put images there or remove the class.")
    if "test" in found and found["train"].keys() != found["test"].keys():
        pairs = ((split, name) for split in SPLITS for name in found[split])
        only = [f"{split}/{name}/" for split, name in pairs if not all(name in classes for classes in found.values())]
        raise UserError(
            f"{path}: train/ and test/ have different classes: {', '.join(sorted(only))} has no counterpart. "
            "Add images for the other split or remove the class."
        )
    if len(found["train"]) < 2:
        raise UserError(
            f"{path}: has one class only ({next(iter(found['train']))}); a classifier needs two. "
            "Add another class folder."
        )


def _source(path: Path, found: Found, test_fraction: float, rng: np.random.Generator) -> Source:
    classes = list(found["train"])
    train, test = (_samples(found[split]) if split in found else [] for split in SPLITS)
    return Source(classes, train, test) if test else samples.cut(classes, train, test_fraction, rng)


def _samples(classes: dict[str, list[Entry]]) -> list[Sample]:
    return [
        Sample(entry.shown, label, partial(image_decoding.from_file, entry.read))
        for label, name in enumerate(classes)
        for entry in classes[name]
        if entry.read
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
