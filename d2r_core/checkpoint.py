"""Finished weights (safetensors, with a JSON that describes them) and the state of an unfinished training.

All files are written atomically.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from d2r_core import models
from d2r_core.errors import UserError
from d2r_core.files import atomic, sha256, write_text


def metadata_path(path: Path) -> Path:
    """The JSON file that describes the weights at `path`."""
    return path.with_suffix(".json")


def save(path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the model's state to `path` (safetensors) and `metadata` to the JSON beside it.

    `metadata["architecture"]` must hold what `models.build` needs. The weights' SHA-256 is added as `weights_sha256`.
    """
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    complete = {**metadata, "weights_sha256": sha256(path)}
    write_text(metadata_path(path), json.dumps(complete, indent=2) + "\n")


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON beside the weights at `path`. Raises UserError when it is missing or damaged."""
    json_path = metadata_path(path)
    try:
        metadata = json.loads(json_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{json_path}: cannot be read ({error}). It belongs beside {path.name}.") from None
    assert isinstance(metadata, dict)
    return metadata


def load(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that `path`'s JSON describes and load its weights; returns it in eval mode, with the JSON.

    Raises:
        UserError: a file is missing or damaged, or the weights are not the ones that the JSON describes.
    """
    metadata = read_metadata(path)
    model = models.build(**metadata["architecture"])
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as weights ({error}).") from None
    if sha256(path) != metadata["weights_sha256"]:
        raise UserError(f"{path}: is not the file that {metadata_path(path).name} describes (SHA-256 differs).")
    model.load_state_dict(state)
    return model.to(device).eval(), metadata


_LATEST, _PREVIOUS = "latest.pt", "previous.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a training's state into `folder`; the previous state is kept beside it.

    At every moment, also when the disk is full, the folder holds an intact state.

    Raises:
        UserError: it cannot be written; the previous state is intact.
    """
    content = io.BytesIO()
    torch.save(state, content)
    payload = content.getbuffer()
    try:
        with atomic(folder / _LATEST, keep=folder / _PREVIOUS) as temporary, temporary.open("wb") as stream:
            stream.write(hashlib.sha256(payload).digest())
            stream.write(payload)
    except OSError as error:
        raise UserError(
            f"{folder / _LATEST}: the training state cannot be written ({error.strerror}). The last one that was "
            "written is intact: make room, and run the stage again to continue from it."
        ) from None


def load_state(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest intact state in `folder`, tensors on the CPU; None if there is none.

    `warn` is called with a message for each damaged file.
    """
    for name in (_LATEST, _PREVIOUS):
        path = folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() == digest:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            assert isinstance(state, dict)
            return state
        warn(f"{path} is damaged and is not used.")
    return None
