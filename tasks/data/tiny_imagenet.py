"""Tiny ImageNet in its original layout, as a folder or a zip archive; its validation images are the test split.

wnids.txt                       the classes, as WordNet ids
words.txt                       names of WordNet ids
train/<wnid>/images/<image>
val/images/<image>              their classes are in val/val_annotations.txt
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
def open_source(path: Path) -> Iterator[Source]:
    """The classes are in the order of their WordNet ids; the samples can be opened while the context is active.

    Args:
        path: the archive, the unpacked folder, or a folder that contains one of the two under its original name.

    Raises:
        UserError: the data are missing, the archive is damaged or unsafe, or the layout is not the original one.
    """
    with ExitStack() as stack:
        root = _root(path)
        yield _source(root, {entry.name: entry for entry in archive.list_entries(root, stack)})


def _root(path: Path) -> Path:
    for root in (path / _NAME, path / f"{_NAME}.zip"):
        if root.exists():
            return root
    if path.is_file() or (path / "wnids.txt").exists():
        return path
    raise UserError(
        f"{path}: does not contain Tiny ImageNet. Download {_URL} manually to {path / f'{_NAME}.zip'}, or set "
        "prepare.path (params.yaml) to the archive or the unpacked folder."
    )


def _source(root: Path, entries: Mapping[str, Entry]) -> Source:
    wnids = sorted(line[0] for line in _table(root, entries, "wnids.txt"))
    repeated = [wnid for wnid, count in Counter(wnids).items() if count > 1]
    if len(wnids) < 2 or repeated:
        raise UserError(
            f"{root}: wnids.txt lists {len(wnids)} classes, {', '.join(repeated) or 'none'} of them twice. "
            "Restore the original file."
        )
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    return Source(_names(root, entries, wnids), _train(root, entries, labels), _val(root, entries, labels), grey=True)


def _names(root: Path, entries: Mapping[str, Entry], wnids: list[str]) -> list[str]:
    """The first name of each class; followed by the id if two classes share it, and the id alone if there is none."""
    names = {line[0]: line[1] for line in _table(root, entries, "words.txt") if len(line) > 1}
    first = [names.get(wnid, wnid).partition(",")[0] for wnid in wnids]
    counts = Counter(first)
    return [f"{name} ({wnid})" if counts[name] > 1 else name for name, wnid in zip(first, wnids, strict=True)]


def _train(root: Path, entries: Mapping[str, Entry], labels: Mapping[str, int]) -> list[Sample]:
    samples = []
    for entry in entries.values():
        match entry.name.split("/"):
            case ["train", wnid, "images", _] if entry.read and wnid in labels:
                samples.append(_sample(entry, labels[wnid]))
            case ["train", wnid, file] if wnid in labels and file in ("", "images", f"{wnid}_boxes.txt"):
                pass
            case ["train", _, *_] if entry.read:
                raise UserError(
                    f"{entry.display_name}: does not fit the layout train/<wnid>/images/<image> with the ids of "
                    "wnids.txt. Move or remove it."
                )
    _check_complete(root, "train/<wnid>/images/", samples, labels)
    return samples


def _val(root: Path, entries: Mapping[str, Entry], labels: Mapping[str, int]) -> list[Sample]:
    folder, annotations = "val/images/", "val/val_annotations.txt"
    lines = [line[:2] for line in _table(root, entries, annotations) if len(line) > 1]
    if repeated := [file for file, count in Counter(line[0] for line in lines).items() if count > 1]:
        raise UserError(f"{root}: {annotations} lists {repeated[0]} twice. Restore the original file.")
    wnids = dict(lines)
    files = {name.removeprefix(folder) for name, entry in entries.items() if entry.read and name.startswith(folder)}
    if unmatched := sorted(files ^ wnids.keys()):
        raise UserError(
            f"{root}: {annotations} and {folder} do not match: {unmatched[0]} is in only one of them (unmatched "
            f"files: {len(unmatched)}). Restore the original files."
        )
    if unknown := sorted(set(wnids.values()) - labels.keys()):
        raise UserError(
            f"{root}: {annotations} contains {unknown[0]}, which is not in wnids.txt. Restore the original file."
        )
    samples = [_sample(entries[f"{folder}{file}"], labels[wnids[file]]) for file in sorted(files)]
    _check_complete(root, annotations, samples, labels)
    return samples


def _sample(entry: Entry, label: int) -> Sample:
    assert entry.read
    return Sample(entry.display_name, label, partial(image_decoding.from_file, entry.read))


def _check_complete(root: Path, part: str, samples: list[Sample], labels: Mapping[str, int]) -> None:
    present = {sample.label for sample in samples}
    if missing := [wnid for wnid, label in labels.items() if label not in present]:
        raise UserError(
            f"{root}: {part} has no image of {missing[0]} (classes without images: {len(missing)}). Restore the "
            "original files."
        )


def _table(root: Path, entries: Mapping[str, Entry], name: str) -> list[list[str]]:
    """The fields of each line of a text file."""
    entry = entries.get(name)
    if not entry or not entry.read:
        raise UserError(
            f"{root}: has no {name}, but {', '.join(list(entries)[:3]) or 'nothing'}, .... It is not Tiny ImageNet in "
            f"its original layout ({_URL})."
        )
    try:
        lines = entry.read().decode().splitlines()
    except Exception as error:  # a damaged archive raises all kinds of errors
        raise UserError(f"{entry.display_name}: cannot be read ({error}). Restore the original file.") from None
    return [line.split("\t") for line in lines if line.strip()]
