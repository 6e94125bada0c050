"""Classifies every image of a folder with a model as a client gets it, into a parquet file.

Images are read as the stage `prepare` reads them: size, fit, colours, transparency and the camera's orientation.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from d2r_core import files
from d2r_core.errors import UserError
from tasks.data import archive, image_decoding, parallel_decoding
from tasks.data.image_decoding import Decoded
from tasks.data.samples import Sample
from tasks.registry.client_model import ClientModel

_BATCH = 256  # images in memory at once, beside those that are being decoded
_ROW_GROUP = 16384  # rows that are written at once: a file of many small groups is slow to read


T = TypeVar("T")


class Predictions(NamedTuple):
    """How many images were classified, and which could not be: their path in the folder, and why."""

    predicted: int
    unusable: list[tuple[str, str]]


def predict_folder(model: ClientModel, folder: Path, out: Path) -> Predictions:
    """Classify the files in a folder and in those below it, hidden ones excepted, and write `out`, a row an image.

    Columns: `file` (its path in the folder), `label`, `probability` (of the label), `probability_CLASS` for each class,
    `version` (missing for a checkpoint) and `weights_sha256`. The rows are in the order of the paths. Memory does not
    grow with the number of images, except for their paths. `out` is replaced once all are classified.

    Raises:
        UserError: there is no such folder, it has no file that is an image, or it contains a link.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Give a folder of images.")
    if out.is_dir():
        raise UserError(f"{out}: is a folder. Name a file: --out NAME.parquet.")
    unusable: list[tuple[str, str]] = []
    tables, predicted = _tables(_usable(_samples(folder), model, unusable), model), 0
    try:
        with files.atomic(out) as temporary, pyarrow.parquet.ParquetWriter(temporary, _schema(model)) as writer:
            for group in _batches(tables, _ROW_GROUP // _BATCH):
                table = pa.concat_tables(group)
                writer.write_table(table)
                predicted += len(table)
            if not predicted:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable[:3]) or "it is empty"
                raise UserError(f"{folder}: has no image that can be classified ({reasons}).")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}).") from None
    return Predictions(predicted, unusable)


def _samples(folder: Path) -> list[Sample]:
    """The files, by their path in the folder."""
    with ExitStack() as stack:
        entries = archive.list_entries(folder, stack)
    samples = []
    for entry in entries:
        if entry.read:
            path = Path(entry.display_name).relative_to(folder).as_posix()
            # A name that is no UTF-8 cannot be written as text.
            name = path.encode(errors="backslashreplace").decode()
            samples.append(Sample(name, 0, partial(image_decoding.from_file, entry.read)))
    return sorted(samples, key=lambda sample: sample.name)


def _usable(
    samples: list[Sample], model: ClientModel, unusable: list[tuple[str, str]]
) -> Iterator[tuple[str, Decoded]]:
    """The images that can be classified; the others are added to `unusable`."""
    size = model.image_size
    decoding = parallel_decoding.decode_in_order(samples, size, parallel_decoding.THREADS, model.prepare.fit)
    with closing(decoding) as decoded:
        progress = tqdm(decoded, total=len(samples), desc="predicting", unit=" images", disable=None)
        for sample, image in zip(samples, progress, strict=True):
            if not isinstance(image, Decoded):
                unusable.append((sample.name, image))
            elif model.prepare.refused.intersection(image.changes):
                reason = f"{image.original}, not RGB of {size} x {size} pixels, and prepare.on_mismatch is refuse"
                unusable.append((sample.name, reason))
            else:
                yield sample.name, image


def _schema(model: ClientModel) -> pa.Schema:
    probabilities = ["probability", *(f"probability_{name}" for name in model.classes)]
    return pa.schema(
        [
            ("file", pa.string()),
            ("label", pa.string()),
            *((name, pa.float64()) for name in probabilities),
            ("version", pa.int64()),
            ("weights_sha256", pa.string()),
        ]
    )


def _tables(usable: Iterator[tuple[str, Decoded]], model: ClientModel) -> Iterator[pa.Table]:
    schema = _schema(model)
    for batch in _batches(usable, _BATCH):
        rows: pd.DataFrame = model.predict(np.stack([image.pixels for _, image in batch]))
        probabilities = np.array(rows["probabilities"].tolist())  # (B, classes)
        columns: list[Any] = [
            [name for name, _ in batch],
            rows["label"].tolist(),
            probabilities.max(1),
            *probabilities.T,
            [model.version] * len(batch),
            [model.weights_sha256] * len(batch),
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
