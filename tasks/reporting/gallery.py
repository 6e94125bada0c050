"""Images of the evaluation as the report shows them: clean, adversarial, the perturbation, and what was predicted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.reporting.rendering import Pixels, picture

MAGNIFIED = 10  # times: how large a perturbation is shown


class Prediction(NamedTuple):
    label: str
    correct: bool


class AttackedImage(NamedTuple):
    """One image as one model sees it."""

    model: str
    adversarial: str  # data URIs
    perturbation: str
    before: Prediction  # on the clean image
    after: Prediction  # on the adversarial one
    records: list[dict[str, Any]]  # of examples.parquet, one per attack: attack, margin, `predicted` (Prediction)


class GalleryRow(NamedTuple):
    number: int  # in the test split
    label: str
    clean: str  # data URI
    smallest_eps: float | None  # at which it is misclassified; None: at none that was tried
    attacked: list[AttackedImage]


def rows(
    tensors: Mapping[str, npt.NDArray[Any]], examples: pd.DataFrame, classes: Sequence[str], count: int
) -> list[GalleryRow]:
    """The first `count` images, in their order.

    Args:
        tensors: gallery.safetensors.
        examples: examples.parquet; it has a row for each attack on an image.
    """
    models = [model for model in ("target", "guidance") if f"{model}_adversarial" in tensors]
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in examples[examples["index"].isin(tensors["index"][:count])].to_dict("records"):
        predicted = _prediction(record["prediction"], record["label"], classes)
        by_name = {str(key): value for key, value in record.items()}
        records.setdefault((record["model"], record["index"]), []).append({**by_name, "predicted": predicted})
    gallery = []
    for i, (number, label) in enumerate(zip(tensors["index"][:count], tensors["labels"][:count], strict=True)):
        smallest = float(tensors["smallest_eps"][i])
        gallery.append(
            GalleryRow(
                number=int(number),
                label=classes[label],
                clean=picture(tensors["clean"][i], "PNG"),
                smallest_eps=smallest if math.isfinite(smallest) else None,
                attacked=[_attacked(tensors, i, model, classes, records[model, int(number)]) for model in models],
            )
        )
    return gallery


def _attacked(
    tensors: Mapping[str, npt.NDArray[Any]], i: int, model: str, classes: Sequence[str], records: list[dict[str, Any]]
) -> AttackedImage:
    adversarial, label = tensors[f"{model}_adversarial"][i], tensors["labels"][i]
    perturbation = adversarial - tensors["clean"][i].astype(np.float32) / 255
    return AttackedImage(
        model=model,
        adversarial=picture(_grey_levels(adversarial), "PNG"),
        perturbation=picture(_grey_levels(0.5 + MAGNIFIED * perturbation), "PNG"),
        before=_prediction(tensors[f"{model}_clean_prediction"][i], label, classes),
        after=_prediction(tensors[f"{model}_adversarial_prediction"][i], label, classes),
        records=records,
    )


def _prediction(prediction: int, label: int, classes: Sequence[str]) -> Prediction:
    return Prediction(classes[prediction], bool(prediction == label))


def _grey_levels(image: npt.NDArray[np.float32]) -> Pixels:
    """An image in [0, 1] as uint8; what lies outside is clipped."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
