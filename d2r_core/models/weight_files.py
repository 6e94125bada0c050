"""Reads the weights out of published files, in whatever they are wrapped, without running code from a file."""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2r_core.errors import UserError
from d2r_core.models.normalization import Normalization

_PREFIXES = ("module.", "model.", "_orig_mod.", "1.")  # "1.": of nn.Sequential(normalisation, network)
# The normalisation's own entries, where it is a part of the saved module
_NORMALIZATION_NAMES = (("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std"), ("0.mean", "0.std"))
# Of AveragedModel: how many models its weights average; of some WideResNets: a stage that `forward` does not use
_UNUSED = re.compile(r"n_averaged$|sub_block1\.")
_NAMESPACE = f"{argparse.Namespace.__module__}.{argparse.Namespace.__qualname__}"


class Weights(NamedTuple):
    """What a file holds for one model."""

    tensors: dict[str, Tensor]  # by name, without prefixes
    normalization: Normalization | None  # where the file has it


class _Skipped:
    """Stands for an object of a class that is neither imported nor made: it takes every argument and keeps none."""

    def __new__(cls, *arguments: object, **options: object) -> "_Skipped":
        return super().__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_weights(path: Path, expected: Collection[str], *, key: str | None = None) -> Weights:
    """Find the weights in a safetensors or PyTorch file.

    A file may hold several mappings of tensors, nested or beside each other: those count that have `expected` names.

    Args:
        expected: the names in the state dict of the model that they are for.
        key: the entry that holds them, such as "ema" or "state.ema", where more than one does.

    Raises:
        UserError: the file cannot be read, would run code, holds no weights, or holds several and `key` names none.
    """
    candidates = dict(_mappings(_read(path), "", expected))
    if not candidates:
        raise UserError(f"{path}: holds no weights: it has no named tensors.")
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    complete = {entry: weights for entry, weights in candidates.items() if needed <= set(_stripped(weights))}
    # Where none is complete, all are looked at, and the first is compared with the model.
    considered = complete or candidates
    chosen = [entry for entry in considered if key is None or f"{entry}.".startswith(f"{key}.")]
    names = ", ".join(entry or "(the file itself)" for entry in considered)
    if not chosen:
        raise UserError(f"{path}: --key {key}: has no weights there; it has them under {names}.")
    if complete and len(chosen) > 1:
        raise UserError(f"{path}: holds {len(chosen)} sets of weights: {names}. Say which one: --key NAME.")
    return _weights(path, candidates[chosen[0]])


def _mappings(content: object, entry: str, expected: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of named tensors that shares names with the model, by its place; if there is none, the first."""
    mappings = list(_all_mappings(content, entry))
    sharing = [(place, tensors) for place, tensors in mappings if set(_stripped(tensors)) & set(expected)]
    yield from sharing or mappings[:1]


def _all_mappings(content: object, entry: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield entry, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _all_mappings(value, f"{entry}.{name}" if entry else name)


def _weights(path: Path, tensors: Mapping[str, Tensor]) -> Weights:
    names = _stripped(tensors)
    twice = {name: whole for name, whole in names.items() if len(whole) > 1}
    if twice:
        name, whole = next(iter(twice.items()))
        raise UserError(f"{path}: holds {name} more than once, as {' and '.join(whole)}: save one of the models alone.")
    weights = {name: tensors[whole[0]] for name, whole in names.items() if not _UNUSED.match(name)}
    normalization: Normalization | None = None
    for mean, std in _NORMALIZATION_NAMES:
        if mean in weights and std in weights and weights[mean].numel() in (1, 3):
            values = {"mean": weights.pop(mean), "std": weights.pop(std)}
            normalization = {name: value.double().flatten().expand(3).tolist() for name, value in values.items()}
    return Weights(weights, normalization)


def _stripped(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names without the prefixes that wrappers add -> the names that they come from."""
    names: dict[str, list[str]] = {}
    for whole in tensors:
        name = whole
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        names.setdefault(name, []).append(whole)
    return names


def _read(path: Path) -> object:
    try:
        return load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except UnpicklingError as error:
        refused = _refused_class(error)
        if refused:
            raise UserError(
                f"{path}: cannot be read as weights: it is a pickle that asks for {refused}, and code from a file is "
                "never run. Where it comes from: torch.save(model.state_dict(), ...)."
            ) from None
        reason = "it is no checkpoint"
    except (EOFError, LookupError):  # whose messages are about single bytes
        reason = "it is no checkpoint"
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(f"{path}: cannot be read as weights ({reason}).")


def _unpickled(path: Path) -> Any:
    """The content with tensors and plain values alone: `weights_only`, with a blank for each skipped object."""
    skipped: set[str] = set()
    while True:
        blanks: list[Any] = [(_Skipped, name) for name in sorted(skipped)]
        try:
            with torch.serialization.safe_globals(blanks):
                return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            refused = _refused_class(error)
            if refused is None or refused in skipped or not _is_skipped(refused):
                raise
            skipped.add(refused)


def _is_skipped(name: str) -> bool:
    """Settings and figures that training scripts save beside the weights."""
    return name == _NAMESPACE or name.startswith("numpy.")


def _refused_class(error: UnpicklingError) -> str | None:
    refused = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", str(error))
    return (refused[1] or refused[2]) if refused else None
