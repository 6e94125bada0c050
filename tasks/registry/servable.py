"""The target model as an MLflow model, which `mlflow models serve` and `mlflow.pyfunc.load_model` run.

The logged model holds data only: weights (safetensors), the checkpoint's JSON, what was measured. The code is this
module of the installed package. Nothing is unpickled, and the files are compared with their manifest before use.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import nn

from d2r_core import checkpoint, data
from tasks.registry import integrity

MAX_IMAGES = 1024  # of one request
_BATCH = 128  # bounds the memory for activations


class InvalidImagesError(MlflowException):
    """Images that cannot be classified; MLflow's server answers 400 with the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)
        self._response = json.dumps({"error_code": self.error_code, "message": message})

    def serialize_as_json(self) -> str:
        """The message alone: the server puts the images before it, by assigning to `message`."""
        return self._response


class ServedModel:
    """A model that MLflow calls.

    Args:
        model: in eval mode, on the CPU.
        classes: their names, in the order of the logits.
        image_size: height and width of the images, in pixels.
    """

    def __init__(self, model: nn.Module, classes: list[str], image_size: int) -> None:
        self._model, self._classes, self._image_size = model, classes, image_size

    def predict(self, images: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Classify images; a row for each.

        Args:
            images: (N, 3, H, W), 1 <= N <= MAX_IMAGES; floats in [0, 1], or whole numbers from 0 to 255 (uint8).
            params: `{"logits": True}` adds the logits.

        Returns:
            `label` (a class name), `probabilities` and on request `logits` (lists, in the order of the classes).

        Raises:
            InvalidImagesError: wrong shape, type or range, NaN, infinity, or too many images.
        """
        batches = torch.from_numpy(_validated(images, self._image_size)).split(_BATCH)
        with torch.inference_mode():
            logits = torch.cat([self._model(batch) for batch in batches])
        columns: dict[str, Any] = {
            "label": [self._classes[index] for index in logits.argmax(1).tolist()],
            "probabilities": logits.double().softmax(1).tolist(),
        }
        if params and params.get("logits"):
            columns["logits"] = logits.tolist()
        return pd.DataFrame(columns)


def _validated(images: Any, size: int) -> npt.NDArray[np.float32]:
    """The images as float32 in [0, 1]."""
    try:
        array = np.asarray(images)
    except ValueError:  # lists of unequal lengths
        raise InvalidImagesError(f"Images must form one array of shape (N, 3, {size}, {size}).") from None
    if array.dtype.kind not in "iuf":
        raise InvalidImagesError(f"Images must be an array of numbers, and these are {array.dtype}.")
    if array.ndim != 4 or array.shape[1:] != (3, size, size) or not len(array):
        raise InvalidImagesError(f"Images must have the shape (N, 3, {size}, {size}), and these have {array.shape}.")
    if len(array) > MAX_IMAGES:
        raise InvalidImagesError(f"One request takes {MAX_IMAGES} images at most, and this one has {len(array)}.")
    if not np.isfinite(array).all():
        raise InvalidImagesError("Images must not contain NaN or infinity.")
    whole, low, high = array.dtype.kind in "iu", array.min(), array.max()
    if low < 0 or high > (255 if whole else 1):
        raise InvalidImagesError(
            "Images must be floats in [0, 1] or whole numbers from 0 to 255, and these are "
            f"{'whole numbers' if whole else 'floats'} from {low} to {high}."
        )
    if not whole:
        return array.astype(np.float32)
    floats: npt.NDArray[np.float32] = data.to_float(torch.from_numpy(array.astype(np.uint8))).numpy()
    return floats


def _load_pyfunc(path: str) -> ServedModel:
    """What MLflow calls to load a logged model, with the folder of this project's files in it.

    Raises:
        UserError: a file is not the one that was registered, or the model is not signed as `D2R_PUBLIC_KEY` requires.
    """
    folder = Path(path)
    integrity.verify_loaded(folder.parents[1])
    model, described = checkpoint.load(folder / "target.safetensors", torch.device("cpu"))
    return ServedModel(model, described["classes"], described["architecture"]["image_size"])


def log_model(run_id: str, content: Path, described: Mapping[str, Any]) -> str:
    """Log the evaluated target model to a run as "model"; returns MLflow's id of the logged model.

    Args:
        content: the folder of this project's files, which is named as the last part of `integrity.CONTENT`.
        described: the checkpoint's JSON.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    numbers = Array(DataType.double)
    # MLflow pins pip in the model's environment, and warns where there is none (as in an environment made by uv).
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    run = mlflow.get_run(run_id)
    # Without this, and without an active run, the model would land in MLflow's default experiment.
    begun = mlflow.initialize_logged_model(
        "model", source_run_id=run_id, experiment_id=run.info.experiment_id, params=run.data.params
    )
    with warnings.catch_warnings():
        # MLflow would load the model to try an example, and it has no manifest yet.
        warnings.filterwarnings("ignore", ".*An input example was not provided")
        logged = Model.log(
            artifact_path=None,  # deprecated, but without a default
            model_id=begun.model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            loader_module=__name__,
            data_path=str(content),
            # Without a schema of the input: MLflow would convert whole numbers to floats before anyone could tell.
            signature=ModelSignature(
                outputs=Schema(
                    [
                        ColSpec(DataType.string, "label"),
                        ColSpec(numbers, "probabilities"),
                        ColSpec(numbers, "logits", required=False),
                    ]
                ),
                params=ParamSchema([ParamSpec("logits", DataType.boolean, default=False)]),
            ),
            # Without the local part of a version ("+cpu"), which package registries do not know.
            pip_requirements=[
                f"{name}=={metadata.version(name).partition('+')[0]}" for name in ("torch", "numpy", "safetensors")
            ],
            metadata={"classes": list(described["classes"]), "image_range": described["image_range"]},
        )
    return str(logged.model_id)
