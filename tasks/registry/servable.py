"""The target model as an MLflow model, which `mlflow models serve` and `mlflow.pyfunc.load_model` run.

It is an exported graph in evaluation mode, without pickle and without this project's code: good for serving. Attacks
need the checkpoint.
"""

import logging
from collections.abc import Mapping
from importlib import metadata
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn


def log_model(run_id: str, model: nn.Module, described: Mapping[str, Any], example: npt.NDArray[np.float32]) -> str:
    """Export `model` and log it to a run as "model"; returns the MLflow id of the logged model.

    Args:
        model: on the CPU, in eval mode.
        described: the checkpoint's JSON.
        example: images in [0, 1], (B, 3, H, W), B >= 2: the export would freeze a batch of 1.
    """
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    assert len(example) >= 2
    size, classes = described["architecture"]["image_size"], len(described["classes"])
    float32 = np.dtype("float32")
    # MLflow pins pip in the model's environment, and warns where there is none (as in an environment made by uv).
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    run = mlflow.get_run(run_id)
    # Without this, and without an active run, the model would land in MLflow's default experiment.
    begun = mlflow.initialize_logged_model(
        "model", source_run_id=run_id, experiment_id=run.info.experiment_id, params=run.data.params
    )
    logged = Model.log(
        artifact_path=None,  # deprecated, but without a default
        model_id=begun.model_id,
        flavor=mlflow.pytorch,
        run_id=run_id,
        pytorch_model=model,
        serialization_format="pt2",
        signature=ModelSignature(
            inputs=Schema([TensorSpec(float32, (-1, 3, size, size))]),
            outputs=Schema([TensorSpec(float32, (-1, classes))]),
        ),
        input_example=example,
        # Without the local part of a version ("+cpu"), which package registries do not know.
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in ("torch", "numpy")],
        metadata={"classes": list(described["classes"]), "image_range": described["image_range"]},
    )
    # By default MLflow loads onto the GPU where there is one, which an exported graph of CPU tensors refuses.
    served = Model.load(logged.model_uri)
    served.flavors["python_function"]["config"]["device"] = "cpu"
    with TemporaryDirectory() as folder:
        served.save(f"{folder}/MLmodel")
        mlflow.MlflowClient().log_model_artifact(logged.model_id, f"{folder}/MLmodel")
    return str(logged.model_id)
