"""The architectures under their names, and published weights loaded into them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2r_core.errors import UserError
from d2r_core.models.preact_resnet import PreActResNet18
from d2r_core.models.resnet import ResNet18
from d2r_core.models.wide_resnet import WideResNet


def build(name: str, *, num_classes: int, image_size: int = 32, **architecture: Any) -> nn.Module:
    """Build a model with random weights (from torch's global generator).

    Args:
        name: "wide_resnet" (`depth`, `widen_factor`), "preact_resnet18", or "resnet18" (`width`, `strides`; by
            default the published 64 and (1, 1, 2, 2), at 64 pixels (1, 2, 2, 2)).
        num_classes: number of logits.
        image_size: height and width of the images in pixels.

    Returns:
        A module from images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    Raises:
        UserError: the name is unknown.
    """
    match name:
        case "wide_resnet":
            return WideResNet(num_classes=num_classes, image_size=image_size, **architecture)
        case "preact_resnet18":
            return PreActResNet18(num_classes=num_classes, image_size=image_size, **architecture)
        case "resnet18":
            published = {"width": 64, "strides": (1, 2, 2, 2) if image_size == 64 else (1, 1, 2, 2)}
            return ResNet18(num_classes=num_classes, image_size=image_size, **{**published, **architecture})
    raise UserError(f"architecture {name!r} is unknown; known: wide_resnet, preact_resnet18, resnet18.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors or PyTorch file (never unpickled beyond tensors) into `model`.

    Published files differ in wrapping: a `state_dict` entry is opened, `module.` prefixes and the unused
    `sub_block1.*` of WideResNet are dropped.

    Raises:
        UserError: the file cannot be read, or does not fit the architecture.
    """
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]}).") from None
    state = state.get("state_dict", state)
    named = {name.removeprefix("module."): value for name, value in state.items()}
    weights = {
        name: value for name, value in named.items() if isinstance(value, Tensor) and not name.startswith("sub_block1.")
    }
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # Older files lack BatchNorm's batch counter, which inference does not use.
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in wanted]
    differing = [name for name in weights if name in wanted and weights[name].shape != wanted[name]]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", differing)):
        if names:
            raise UserError(
                f"{path}: does not fit {type(model).__name__}: it {what} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Check the architecture's settings."
            )
    model.load_state_dict(weights, strict=False)
