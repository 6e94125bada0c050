"""From the options of `d2r evaluate` to the model: its architecture, and the weights of the checkpoint."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from d2r_core.errors import UserError

if TYPE_CHECKING:
    import torch

    from tasks.config.paths import Paths
    from tasks.config.settings import Settings
    from tasks.evaluation.evaluate_models import LoadedModel

Architecture = Literal["wide_resnet", "preact_resnet18", "resnet18", "dm_wide_resnet", "dm_preact_resnet18"]
NormalizationName = Literal["none", "cifar10", "cifar100", "imagenet", "symmetric", "per_image"]

# What an architecture must be told, since weights of its variants have the same names and shapes, or since it has no
# default; and what it may be told beside that.
_NEEDED: Mapping[str, set[str]] = {
    "wide_resnet": {"depth", "widen_factor"},
    "preact_resnet18": {"shortcut_from"},
    "resnet18": {"strides"},
    "dm_wide_resnet": {"depth", "widen_factor", "activation", "normalization"},
    "dm_preact_resnet18": {"activation", "normalization"},
}
_ALLOWED = {"preact_resnet18": {"final_norm"}, "resnet18": {"width"}}
_FLAGS = {"normalization": "--normalize (or --mean and --std)"}
_HINTS = {
    "shortcut_from": "activated as in RobustBench's PreActBlockV2, input as in its PreActBlock",
    "strides": "1,2,2,2 as in TRADES and RobustBench, 1,1,2,2 as the guidance model here",
}


def described(
    *, strides: str | None, normalize: NormalizationName | None, mean: str | None, std: str | None, **options: Any
) -> dict[str, Any]:
    """The architecture's options that were given, as models.build takes them; "normalization" is None for "none".

    Raises:
        UserError: a list of numbers cannot be read, or two options exclude each other.
    """
    result = {key: value for key, value in options.items() if value not in (None, False)}
    if strides is not None:
        result["strides"] = _strides(strides)
    if (mean is None) != (std is None) or (mean is not None and normalize is not None):
        raise UserError("the normalisation is given by --mean and --std together, or by --normalize NAME.")
    if mean is not None and std is not None:
        result["normalization"] = {"mean": _three("--mean", mean), "std": _three("--std", std)}
        if min(result["normalization"]["std"]) <= 0:
            raise UserError(f"--std {std}: must be above 0.")
    elif normalize is not None:
        from d2r_core.models.normalization import NORMALIZATIONS

        result["normalization"] = NORMALIZATIONS.get(normalize)
    return result


def load(
    reference: str,
    architecture: dict[str, Any],
    shape: Mapping[str, int],
    settings: "Settings",
    paths: "Paths",
    *,
    device: "torch.device",
    key: str | None = None,
) -> "LoadedModel":
    """The model that a checkpoint holds: of the architecture in the JSON beside it, or of the one that is given.

    Args:
        reference: a file, or a registered version as models:/NAME@champion.
        architecture: as `described` returns it; empty where the JSON decides.
        shape: num_classes and image_size of the data.
        key: the file's entry with the weights.
    """
    from d2r_core import checkpoint, files, models
    from tasks.evaluation.evaluate_models import LoadedModel
    from tasks.registry import versions

    with tempfile.TemporaryDirectory() as folder:
        path = Path(reference)
        if reference.startswith("models:/"):
            path = versions.download(settings, paths, reference, Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        if checkpoint.metadata_path(path).is_file() and "name" not in architecture:
            if architecture or key:
                given = " and ".join([*map(_flag, sorted(architecture)), *(["--key"] if key else [])])
                raise UserError(f"{path}: the JSON beside it describes the model: leave out {given}.")
            model, metadata = checkpoint.load(path, device)
            for name, value in shape.items():
                if metadata["architecture"][name] != value:
                    raise UserError(f"{path}: has {name} {metadata['architecture'][name]}, the data {value}.")
            return LoadedModel(model, metadata)
        whole = {**complete(path, architecture), **shape}
        model = models.build(**whole)
        models.load_weights(model, path, key=key)
        if "normalization" not in architecture:
            typer.echo(
                f"{path}: assumed to take pixels in [0, 1] as they are, since nothing says otherwise. If it was "
                "trained on normalised images, give --normalize, or --mean and --std; --expect-clean ACCURACY checks "
                "it.",
                err=True,
            )
        return LoadedModel(model.to(device).eval(), {"architecture": whole, "weights_sha256": files.sha256(path)})


def complete(path: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture, if it has all that its name needs and nothing else."""
    name = architecture.get("name")
    if name is None:
        raise UserError(f"{path}: has no JSON beside it, so its architecture must be given: --architecture ...")
    given = set(architecture) - {"name"}
    allowed = _NEEDED[name] | _ALLOWED.get(name, set()) | {"normalization"}
    for what, keys in (("needs", _NEEDED[name] - given), ("has no", given - allowed)):
        if keys:
            flags = [_flag(key) for key in sorted(keys)]
            hints = [f" ({_HINTS[key]})" for key in sorted(keys) if what == "needs" and key in _HINTS]
            raise UserError(f"{name} {what} {' and '.join(flags)}{''.join(hints)}.")
    if "depth" in architecture and (architecture["depth"] < 10 or (architecture["depth"] - 4) % 6):
        raise UserError(f"--depth {architecture['depth']}: allowed are 10, 16, 22, 28, 34, ... (6 n + 4).")
    return {key: value for key, value in architecture.items() if value is not None}


def _flag(key: str) -> str:
    return _FLAGS.get(key, f"--{key}".replace("_", "-"))


def _strides(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--strides {text}: write four numbers, such as 1,2,2,2.")
    return tuple(map(int, parts))


def _three(flag: str, text: str) -> tuple[float, ...]:
    """Red, green and blue of a normalisation, in units of images in [0, 1]."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise UserError(f"{flag} {text}: write three numbers from 0 to 1, such as 0.4914,0.4822,0.4465.")
    return values
