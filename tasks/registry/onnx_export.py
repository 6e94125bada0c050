"""The target model as ONNX, for clients without PyTorch: `target.onnx` among the files of a version.

Images float32 (N, 3, H, W) in [0, 1] as the input "images", logits float32 (N, classes) as the output "logits", for any
N. The classes are in the file's metadata, as a JSON list in the order of the logits.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from d2r_core import data
from d2r_core.errors import UserError
from tasks.registry import recorded_examples

FILE = "target.onnx"
# Of the largest logit, or absolute where that is below 1: sums in another order differ by 1e-6 of it.
_TOLERANCE = 1e-5
_REMEDY = "so nothing is registered. To register it without ONNX, set promote.onnx (params.yaml) to false."


def write(model: nn.Module, classes: list[str], folder: Path) -> None:
    """Export `model` into `folder` and compare ONNX Runtime's logits with those of the recorded examples there.

    Args:
        model: in eval mode, on the CPU.
        classes: their names, in the order of the logits.
        folder: has `recorded_examples.FILE`.

    Raises:
        UserError: the model cannot be exported, or the logits differ by more than 1e-5 of the largest one.
    """
    recorded = load_file(folder / recorded_examples.FILE)
    images = data.to_float(recorded["images"])
    path = folder / FILE
    try:
        _export(model, images, classes, path)
        output = _run(path, images)
    except Exception as error:  # exporter and ONNX Runtime raise all kinds of errors
        cause = error.__cause__ or error  # the exporter's own message is a page about its steps
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"The model cannot be exported to ONNX ({reason}), {_REMEDY}") from error
    difference = float((output - recorded["logits"]).abs().max())
    largest = float(recorded["logits"].abs().max())
    if not difference <= _TOLERANCE * max(1.0, largest):  # NaN included
        raise UserError(
            f"The exported ONNX model differs from the trained one: its logits for {len(images)} test images are off "
            f"by up to {difference:.2g}, where the largest is {largest:.3g}, {_REMEDY}"
        )


def _export(model: nn.Module, images: torch.Tensor, classes: list[str], path: Path) -> None:
    # A batch of one would become a constant of the graph.
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own code
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(classes)
    program.save(path)


def _run(path: Path, images: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime's logits, (N, classes)."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(logits)
