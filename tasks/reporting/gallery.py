"""Images of the evaluation as the report shows them: clean, adversarial, the perturbation, and what was predicted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.reporting.rendering import Pixels, picture

MAGNIFIED = 10  # times: how large a perturbation is shown


def rows(
    tensors: Mapping[str, npt.NDArray[Any]], examples: pd.DataFrame, classes: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The first `count` images, in their order.

    Args:
        tensors: gallery.safetensors.
        examples: examples.parquet; each image says how it fared under every attack it was given to.

    Returns:
        For each image: `index` in the test split, `label`, `clean` (data URI), `smallest_eps` (None: it falls at none),
        and `attacked`: of each model its name, `adversarial` and `perturbation` (data URIs), the predictions `before`
        and `after`, and `records` (attack, prediction, margin).
    """
    models = [model for model in ("target", "guidance") if f"{model}_adversarial" in tensors]
    told: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in examples[examples["index"].isin(tensors["index"][:count])].to_dict("records"):
        told.setdefault((record["model"], record["index"]), []).append({str(key): said for key, said in record.items()})

    def said(prediction: int, label: int) -> dict[str, Any]:
        return {"label": classes[prediction], "right": bool(prediction == label)}

    shown = []
    for i, (index, label) in enumerate(zip(tensors["index"][:count], tensors["labels"][:count], strict=True)):
        clean, smallest = tensors["clean"][i], float(tensors["smallest_eps"][i])
        attacked = []
        for model in models:
            adversarial = tensors[f"{model}_adversarial"][i]
            perturbation = adversarial - clean.astype(np.float32) / 255
            attacked.append(
                {
                    "model": model,
                    "adversarial": picture(_grey_levels(adversarial), "PNG"),
                    "perturbation": picture(_grey_levels(0.5 + MAGNIFIED * perturbation), "PNG"),
                    "before": said(tensors[f"{model}_clean_prediction"][i], label),
                    "after": said(tensors[f"{model}_adversarial_prediction"][i], label),
                    "records": [
                        {**record, **said(record["prediction"], record["label"])} for record in told[model, int(index)]
                    ],
                }
            )
        shown.append(
            {
                "index": int(index),
                "label": classes[label],
                "clean": picture(clean, "PNG"),
                "smallest_eps": smallest if math.isfinite(smallest) else None,
                "attacked": attacked,
            }
        )
    return shown


def _grey_levels(image: npt.NDArray[np.float32]) -> Pixels:
    """An image in [0, 1] as uint8; what lies outside is clipped."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
