"""A few test images with the logits that the registered model had for them: does a client get the same today?

Recorded at the registration, among the files of the version, and predicted again before an alias moves.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from d2r_core import data
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.registry import integrity

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FILE = "recorded_examples.safetensors"
_IMAGES = 16
# Another CPU or release of PyTorch sums in another order; a wrong model is off by whole units.
_TOLERANCE = 1e-3


def write(paths: Paths, model: nn.Module, folder: Path) -> None:
    """Record the first test images, uint8 (N, 3, H, W), and the logits (N, classes) of `model`, which is on the CPU."""
    images = data.load_split(paths.prepared / "test.safetensors").images[:_IMAGES].clone()
    with torch.inference_mode():
        logits = model(data.to_float(images))
    save_file({"images": images, "logits": logits.clone()}, folder / FILE)


def predict(version: "ModelVersion", public_key: Path | None) -> None:
    """Verify a version, with its signature if there is a `public_key`, load it as a client does, and predict.

    Raises:
        UserError: its files are not the ones that were registered or not signed by that key, or its logits for the
            recorded examples are others than at the registration.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        # Verified first: loading reads MLmodel, which names the code.
        content = integrity.fetch(version, Path(temporary), public_key)
        recorded = load_file(content / FILE)
        served = mlflow.pyfunc.load_model(temporary)
    answers = served.predict(recorded["images"].numpy(), params={"logits": True})
    difference = float((torch.tensor(answers["logits"].tolist()) - recorded["logits"]).abs().max())
    if not difference <= _TOLERANCE:  # NaN included
        raise UserError(
            f"{version.name} version {version.version} does not answer as it did when it was registered: its logits "
            f"for {len(answers)} recorded images differ by up to {difference:.2g}, so it is not promoted. Compare the "
            "installed packages with requirements.lock."
        )
