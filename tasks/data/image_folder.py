"""Images in class folders: `train/<class>/<image>` and `test/<class>/<image>`, or without a test split.

They may be in a folder, in a zip archive, or in several archives, which are merged.
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
Layout = dict[str, dict[str, list[Entry]]]  # split -> class -> entries, both sorted by name


@contextmanager
def open_source(path: Path, test_fraction: float, rng: np.random.Generator) -> Iterator[Source]:
    """The classes are the sorted folder names; the samples can be opened while the context is active.

    Args:
        test_fraction: of each class, drawn with `rng` as the test split if there is no test/.

    Raises:
        UserError: `path` does not exist, an archive is damaged or unsafe, or the layout is not the documented one.
    """
    with ExitStack() as stack:
        layout = _arrange(path, [entry for root in _roots(path) for entry in archive.list_entries(root, stack)])
        yield _source(layout, test_fraction, rng)


@contextmanager
def open_for_evaluation(path: Path) -> Iterator[Source]:
    """As `open_source`, for an external model: `test` has the images below test/, or all if there are no splits."""
    with ExitStack() as stack:
        entries = [entry for root in _roots(path) for entry in archive.list_entries(root, stack)]
        if not any(entry.name.startswith("train/") for entry in entries):
            entries = [
                entry._replace(name=entry.name.removeprefix("test/")) for entry in entries if entry.name != "test/"
            ]
        layout = _arrange(path, entries)
        yield Source(list(layout["train"]), [], _samples(layout.get("test", layout["train"])))


def _roots(path: Path) -> list[Path]:
    """The folder or archive itself, or the archives in the folder."""
    if not path.is_dir():
        return [path]
    children = sorted(child for child in path.iterdir() if not archive.hidden(child.name))
    archives = [child for child in children if child.suffix.lower() == ".zip" and child.is_file()]
    if archives and any(child.is_dir() for child in children):
        raise UserError(
            f"{path}: contains both folders and archives ({archives[0].name}). Keep only one kind, or set prepare.path "
            "(params.yaml) to the one to use."
        )
    return archives or [path]


def _arrange(path: Path, entries: list[Entry]) -> Layout:
    """Group the entries by split and class; every image must fit the layout."""
    tops = sorted({f"{entry.name.partition('/')[0]}/" for entry in entries if "/" in entry.name})
    splits = [split for split in SPLITS if f"{split}/" in tops]
    others = [top for top in tops if top.rstrip("/") not in SPLITS]
    if splits and (others or "train" not in splits):
        raise UserError(
            f"{path}: has the folders {_first(tops)}; only train/ and test/ may be combined. Rename or move the "
            f"others. The layout is {_LAYOUT}."
        )
    layout: Layout = {split: {} for split in splits or SPLITS[:1]}
    previous = None
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.display_name)):
        if entry.read and previous and previous.name == entry.name:
            raise UserError(
                f"{entry.display_name}: has the same name as {previous.display_name}. Rename or remove one of the two."
            )
        previous = entry
        parts = entry.name.rstrip("/").split("/")
        split, *below = parts if splits else ["train", *parts]
        match below:
            case [name] if not entry.read:
                layout[split].setdefault(name, [])
            case [name, _] if entry.read:
                layout[split].setdefault(name, []).append(entry)
            case _ if len(parts) == 1:
                pass  # the split's folder, or a file beside the folders, such as a licence
            case _:
                raise UserError(f"{entry.display_name}: does not fit the layout {_LAYOUT}. Move or remove it.")
    _check(path, layout, tops)
    return {split: dict(sorted(classes.items())) for split, classes in layout.items()}


def _check(path: Path, layout: Layout, tops: list[str]) -> None:
    if not all(layout.values()):
        raise UserError(f"{path}: has no class folder ({_first(tops)}). The layout is {_LAYOUT}.")
    empty = [f"{split}/{name}/" for split in layout for name, files in sorted(layout[split].items()) if not files]
    if empty:
        raise UserError(f"{path}: there are no images in {', '.join(empty)}. Add images or remove the class.")
    if "test" in layout and layout["train"].keys() != layout["test"].keys():
        pairs = ((split, name) for split in SPLITS for name in layout[split])
        only = [f"{split}/{name}/" for split, name in pairs if not all(name in classes for classes in layout.values())]
        raise UserError(
            f"{path}: train/ and test/ have different classes: {', '.join(sorted(only))} is missing in the other "
            "split. Add images there or remove the class."
        )
    if len(layout["train"]) < 2:
        raise UserError(
            f"{path}: has only one class ({next(iter(layout['train']))}); a classifier needs at least two. "
            "Add another class folder."
        )


def _source(layout: Layout, test_fraction: float, rng: np.random.Generator) -> Source:
    classes = list(layout["train"])
    train, test = (_samples(layout[split]) if split in layout else [] for split in SPLITS)
    return Source(classes, train, test) if test else samples.with_test_split(classes, train, test_fraction, rng)


def _samples(classes: dict[str, list[Entry]]) -> list[Sample]:
    return [
        Sample(entry.display_name, label, partial(image_decoding.from_file, entry.read))
        for label, name in enumerate(classes)
        for entry in classes[name]
        if entry.read
    ]


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "no folders"
