"""A model as a client gets it: a version, verified and loaded by MLflow, or a checkpoint of this project."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import yaml

from d2r_core import checkpoint
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.image_decoding import MISMATCHES, Fit
from tasks.registry import servable, signing, version_files
from tasks.registry.versions import connect, get_referenced


class Preparation(NamedTuple):
    """How the images that the model was trained on were prepared: settings of `prepare`."""

    fit: Fit
    refused: frozenset[str]  # of image_decoding.MISMATCHES: conversions that none of the images needed

    @classmethod
    def of(cls, source: str, fit: Fit, on_mismatch: str) -> "Preparation":
        if on_mismatch == "convert":
            return cls(fit, frozenset())
        # Grey images are part of Tiny ImageNet (`Source.grey`).
        grey = {"grey"} if source == "tiny_imagenet" else set()
        return cls(fit, frozenset(MISMATCHES - grey))


class ClientModel(NamedTuple):
    """A loaded model, and what a client must know of it."""

    served: Any  # servable.ServedModel, or MLflow's model around it
    classes: list[str]
    image_size: int  # pixels
    prepare: Preparation
    version: int | None  # None: a checkpoint
    weights_sha256: str

    def predict(self, images: npt.NDArray[np.uint8]) -> pd.DataFrame:
        """`label` and `probabilities` of images, uint8 (N, 3, H, W), as `ServedModel.predict` returns them."""
        rows: pd.DataFrame = self.served.predict(images)
        return rows


def load_version(settings: Settings, paths: Paths, reference: str) -> ClientModel:
    """A version of the registered model by number or alias, verified, with its signature if one is required.

    Raises:
        UserError: there is no such version, its files are not the ones that were registered or not signed as required,
            or it does not say how its images were prepared.
    """
    import mlflow

    with connect(settings, paths) as client, tempfile.TemporaryDirectory() as folder:
        registered = get_referenced(client, settings.promote.model_name, reference)
        # Verified first: loading reads MLmodel, which names the code.
        content = version_files.read(registered, Path(folder), signing.trusted_key(settings, paths))
        prepare = _preparation(content.folder / paths.params.name, f"version {registered.version}")
        served = mlflow.pyfunc.load_model(folder)
        return _described(served, content.metadata, prepare, int(registered.version))


def load_checkpoint(settings: Settings, path: Path) -> ClientModel:
    """A checkpoint with its JSON beside it; its images are prepared as the present settings say.

    Raises:
        UserError: a file is missing or damaged, or the weights are not the ones that the JSON describes.
    """
    model, metadata = checkpoint.load(path, torch.device("cpu"))
    served = servable.ServedModel(model, metadata["classes"], metadata["architecture"]["image_size"])
    prepare = Preparation.of(settings.prepare.source, settings.prepare.fit, settings.prepare.on_mismatch)
    return _described(served, metadata, prepare, None)


def _described(served: Any, metadata: dict[str, Any], prepare: Preparation, version: int | None) -> ClientModel:
    return ClientModel(
        served=served,
        classes=list(metadata["classes"]),
        image_size=metadata["architecture"]["image_size"],
        prepare=prepare,
        version=version,
        weights_sha256=metadata["weights_sha256"],
    )


def _preparation(params: Path, name: str) -> Preparation:
    """From the params.yaml of the version, of which other sections may be those of another release."""
    try:
        section = yaml.safe_load(params.read_text(encoding="utf-8"))["prepare"]
        return Preparation.of(section["source"], section["fit"], section["on_mismatch"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(
            f"{name} does not say how its images were prepared ({params.name} is missing in its files or of another "
            "release). Give its weights instead, which are prepared as the params.yaml here says: --checkpoint."
        ) from None
