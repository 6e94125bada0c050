"""Builds the architectures by name and loads published weights into them."""

import re
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

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # entries of published files that hold the weights
_PREFIXES = ("module.", "model.", "_orig_mod.")


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
    """Load a safetensors or PyTorch file (tensors only: no other pickled object is loaded) into `model`.

    Published files differ in layout: entries such as `state_dict` are opened, prefixes such as `module.` and the
    unused `sub_block1.*` of WideResNet are dropped.

    Raises:
        UserError: the file cannot be read, would run code, holds no weights, or does not fit the architecture.
    """
    weights = {
        name: tensor for name, tensor in _state_dict(_read(path), path).items() if not name.startswith("sub_block1.")
    }
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    head = list(expected)[-1]
    # Older files lack BatchNorm's batch counter, which inference does not use.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in expected]
    differing = [name for name in weights if name in expected and weights[name].shape != expected[name]]
    if not missing and not unknown and head in differing and weights[head].shape[0] != expected[head][0]:
        raise UserError(f"{path}: has {weights[head].shape[0]} classes, not {expected[head][0]} as the data has.")
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", differing)):
        if names:
            raise UserError(
                f"{path}: does not fit {type(model).__name__}: it {what} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Check the architecture's settings."
            )
    model.load_state_dict(weights, strict=False)


def _read(path: Path) -> object:
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path}: cannot be read as weights: it is a pickle that asks for {refused[1] or refused[2]}, and code "
                "from a file is never run. Where it comes from: torch.save(model.state_dict(), ...)."
            ) from None
        reason = "it is no checkpoint"
    except (EOFError, LookupError):  # whose messages are about single bytes
        reason = "it is no checkpoint"
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(f"{path}: cannot be read as weights ({reason}).")


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name, without the entries and prefixes around them."""
    while isinstance(content, dict) and (
        nested := [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
    ):
        content = nested[0]
    weights = {}
    for name, tensor in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            while name.startswith(_PREFIXES):
                name = name.partition(".")[2]
            weights[name] = tensor
    if not weights:
        raise UserError(f"{path}: holds no weights: it has no named tensors.")
    return weights
