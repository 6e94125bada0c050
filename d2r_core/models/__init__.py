"""Builds the architectures by name and loads published weights into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from d2r_core.errors import UserError
from d2r_core.models.dm_resnet import DMPreActResNet18, DMWideResNet
from d2r_core.models.normalization import Normalization, Normalized
from d2r_core.models.preact_resnet import PreActResNet18
from d2r_core.models.resnet import ResNet18
from d2r_core.models.weight_files import read_weights
from d2r_core.models.wide_resnet import WideResNet

_CLOSE = 1e-5  # between two ways of writing a normalisation


def build(
    name: str,
    *,
    num_classes: int,
    image_size: int = 32,
    normalization: Normalization | None = None,
    **architecture: Any,
) -> nn.Module:
    """Build a model with random weights (from torch's global generator).

    Args:
        name: "wide_resnet" (`depth`, `widen_factor`), "preact_resnet18" (`shortcut_from`, by default "activated", and
            `final_norm`), "resnet18" (`width`, `strides`; by default the published 64 and (1, 1, 2, 2), at 64 pixels
            (1, 2, 2, 2)), "dm_wide_resnet" (`depth`, `widen_factor`, `activation`) or "dm_preact_resnet18"
            (`activation`).
        num_classes: number of logits.
        image_size: height and width of the images in pixels.
        normalization: what the network's images are normalised with; None: it takes them as they are.

    Returns:
        A module from images in [0, 1], (B, 3, H, W), to logits, (B, num_classes).

    Raises:
        UserError: the name is unknown.
    """
    network = _network(name, num_classes, image_size, architecture)
    return network if normalization is None else Normalized(network, normalization)


def _network(name: str, num_classes: int, image_size: int, architecture: Mapping[str, Any]) -> nn.Module:
    match name:
        case "wide_resnet":
            return WideResNet(num_classes=num_classes, image_size=image_size, **architecture)
        case "preact_resnet18":
            return PreActResNet18(num_classes=num_classes, image_size=image_size, **architecture)
        case "resnet18":
            published = {"width": 64, "strides": (1, 2, 2, 2) if image_size == 64 else (1, 1, 2, 2)}
            return ResNet18(num_classes=num_classes, image_size=image_size, **{**published, **architecture})
        case "dm_wide_resnet":
            return DMWideResNet(num_classes=num_classes, **architecture)
        case "dm_preact_resnet18":
            return DMPreActResNet18(num_classes=num_classes, **architecture)
    known = "wide_resnet, preact_resnet18, resnet18, dm_wide_resnet, dm_preact_resnet18"
    raise UserError(f"architecture {name!r} is unknown; known: {known}.")


def load_weights(model: nn.Module, path: Path, *, key: str | None = None) -> None:
    """Load a safetensors or PyTorch file (tensors only: no other pickled object is loaded) into `model`.

    Published files differ in layout: entries such as `state_dict` are opened, prefixes such as `module.` and the
    unused `sub_block1.*` of WideResNet are dropped. A normalisation in the file must be the model's.

    Args:
        model: as `build` makes it.
        key: the file's entry with the weights, such as "ema", where several fit.

    Raises:
        UserError: the file cannot be read, would run code, holds no weights or several, or does not fit the model.
    """
    network, normalization = (model, None)
    if isinstance(model, Normalized):
        network, normalization = model.network, model.normalization
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights, own = read_weights(path, expected, key=key)
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
                f"{path}: does not fit {type(network).__name__}: it {what} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Check the architecture's settings."
            )
    if own is not None and not _same(own, normalization):
        mean, std = (",".join(f"{value:.6g}" for value in own[name]) for name in ("mean", "std"))  # type: ignore[index]
        raise UserError(f"{path}: normalises its images, and the model does not do the same: --mean {mean} --std {std}")
    network.load_state_dict(weights, strict=False)


def _same(one: Normalization, other: Normalization | None) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one == other
    return all(abs(a - b) <= _CLOSE for name in ("mean", "std") for a, b in zip(one[name], other[name], strict=True))
