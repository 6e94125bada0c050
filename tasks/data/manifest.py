"""Reads the manifest of the prepared data."""

import json
from typing import Any

from d2r_core.errors import UserError
from tasks.config.paths import Paths


def read_manifest(paths: Paths) -> dict[str, Any]:
    """Source, classes, counts, shape and content hash. Raises UserError if the file is missing or damaged."""
    try:
        content = json.loads(paths.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{paths.manifest}: cannot be read ({error}). `dvc repro prepare` creates it.") from None
    assert isinstance(content, dict)
    return content
