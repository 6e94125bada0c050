"""Tiny ImageNet in its original layout, as a folder or a zip archive; its validation images are the test split.

wnids.txt                       the classes, by WordNet id
words.txt                       names of WordNet ids
train/<wnid>/images/<image>
val/images/<image>              the classes stand in val/val_annotations.txt
test/images/<image>             without labels: unused
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from d2r_core.errors import UserError
from tasks.data import archive, image_decoding
from tasks.data.archive import Entry
from tasks.data.samples import Sample, Source

_NAME = "tiny-imagenet-200"
_URL = f"http://cs231n.stanford.edu/{_NAME}.zip"


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The classes are in the order of their WordNet ids; the samples can be opened while the context lasts.

    Args:
        path: the archive, the unpacked folder, or a folder that holds one of the two under its original name.

    Raises:
        UserError: nothing is there, the archive is damaged or cannot be trusted, or the layout is another one.
    """
    with ExitStack() as stack:
        place = _place(path)
        yield _source(place, {entry.name: entry for entry in archive.opened(place, stack)})


def _place(path: Path) -> Path:
    for place in (path / _NAME, path / f"{_NAME}.zip"):
        if place.exists():
            return place
    if path.is_file() or (path / "wnids.txt").exists():
        return path
    raise UserError(
        f"{path}: Tiny ImageNet is not there. Download {_URL} by hand and put it at {path / f'{_NAME}.zip'}, or let "
        "prepare.path (params.yaml) name the archive or the unpacked folder."
    )


def _source(place: Path, entries: Mapping[str, Entry]) -> Source:
    wnids = sorted(line[0] for line in _table(place, entries, "wnids.txt"))
    repeated = [wnid for wnid, count in Counter(wnids).items() if count > 1]
    if len(wnids) < 2 or repeated:
        raise UserError(
            f"{place}: wnids.txt names {len(wnids)} classes, {', '.join(repeated) or 'none'} of them twice. "
            "Put the original file there."
        )
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    return Source(
        _names(place, entries, wnids), _train(place, entries, labels), _val(place, entries, labels), grey=True
    )


def _names(place: Path, entries: Mapping[str, Entry], wnids: list[str]) -> list[str]:
    """The first name of each class; with the id where two classes share one, the id alone where there is none."""
    words = {line[0]: line[1] for line in _table(place, entries, "words.txt") if len(line) > 1}
    first = [words.get(wnid, wnid).partition(",")[0] for wnid in wnids]
    shared = Counter(first)
    return [f"{name} ({wnid})" if shared[name] > 1 else name for name, wnid in zip(first, wnids, strict=True)]


def _train(place: Path, entries: Mapping[str, Entry], labels: Mapping[str, int]) -> list[Sample]:
    found = []
    for entry in entries.values():
        match entry.name.split("/"):
            case ["train", wnid, "images", _] if entry.read and wnid in labels:
                found.append(_sample(entry, labels[wnid]))
            case ["train", wnid, file] if wnid in labels and file in ("", "images", f"{wnid}_boxes.txt"):
                pass
            case ["train", _, *_] if entry.read:
                raise UserError(
                    f"{entry.shown}: is out of place; the layout is train/<wnid>/images/<image>, with the ids of "
                    "wnids.txt. Move or remove it."
                )
    _complete(place, "train/<wnid>/images/", found, labels)
    return found


def _val(place: Path, entries: Mapping[str, Entry], labels: Mapping[str, int]) -> list[Sample]:
    folder, annotations = "val/images/", "val/val_annotations.txt"
    lines = [line[:2] for line in _table(place, entries, annotations) if len(line) > 1]
    if twice := [file for file, count in Counter(line[0] for line in lines).items() if count > 1]:
        raise UserError(f"{place}: {annotations} names {twice[0]} twice. Put the original there.")
    wnids = dict(lines)
    files = {name.removeprefix(folder) for name, entry in entries.items() if entry.read and name.startswith(folder)}
    if lost := sorted(files ^ wnids.keys()):
        raise UserError(
            f"{place}: {annotations} and {folder} do not agree: {lost[0]} stands in one of them only (as {len(lost)} "
            "do in all). Put the original files there."
        )
    if strange := sorted(set(wnids.values()) - labels.keys()):
        raise UserError(f"{place}: {annotations} names {strange[0]}, which wnids.txt does not. Put the original there.")
    found = [_sample(entries[f"{folder}{file}"], labels[wnids[file]]) for file in sorted(files)]
    _complete(place, annotations, found, labels)
    return found


def _sample(entry: Entry, label: int) -> Sample:
    assert entry.read
    return Sample(entry.shown, label, partial(image_decoding.from_file, entry.read))


def _complete(place: Path, part: str, found: list[Sample], labels: Mapping[str, int]) -> None:
    present = {sample.label for sample in found}
    if lost := [wnid for wnid, label in labels.items() if label not in present]:
        raise UserError(f"{place}: {part} has no image of {lost[0]} (of {len(lost)} classes). Put the original there.")


def _table(place: Path, entries: Mapping[str, Entry], name: str) -> list[list[str]]:
    """The fields of each line of a text file."""
    entry = entries.get(name)
    if not entry or not entry.read:
        raise UserError(
            f"{place}: has no {name}; found {', '.join(list(entries)[:3]) or 'nothing'}, .... It is not Tiny ImageNet "
            f"in its original layout ({_URL})."
        )
    try:
        lines = entry.read().decode().splitlines()
    except Exception as error:  # an archive's damage shows in many ways
        raise UserError(f"{entry.shown}: cannot be read ({error}). Put the original there.") from None
    return [line.split("\t") for line in lines if line.strip()]
