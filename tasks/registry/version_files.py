"""The files of a registered version, as verified: its model, and what was measured of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from d2r_core import checkpoint
from d2r_core.errors import UserError
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import integrity
from tasks.registry.status import identity_of

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class VersionFiles:
    """A version of the registry and the folder with the verified files of its model."""

    version: "ModelVersion"
    folder: Path

    @property
    def weights(self) -> Path:
        """The checkpoint, target.safetensors with target.json beside it."""
        return self.folder / "target.safetensors"

    @property
    def metadata(self) -> dict[str, Any]:
        """The checkpoint's JSON."""
        return checkpoint.read_metadata(self.weights)

    def evaluation(self) -> tuple[RobustnessReport, pd.DataFrame]:
        """Its figures, and the target's rows of `examples.parquet`.

        Raises:
            UserError: they are in a format that this release does not read, or of another evaluation than its tags say.
        """
        name = f"version {self.version.version}"
        try:
            robustness = RobustnessReport.read(self.folder / "robustness.json")
            examples = pd.read_parquet(self.folder / "examples.parquet")
        except (UserError, OSError, ValueError):
            raise UserError(f"The figures of {name} are in a format that this release does not read.") from None
        if robustness.identity != identity_of(self.version):
            raise UserError(f"The tags of {name} name another evaluation than the one in its files.")
        return robustness, examples[examples["model"] == "target"]


def read(version: "ModelVersion", folder: Path, public_key: Path | None) -> VersionFiles:
    """Bring the files of a version into `folder` and verify them, with the signature if there is a `public_key`.

    Raises:
        UserError: a file is not the one that was registered, or the version has no manifest or no valid signature.
    """
    return VersionFiles(version, integrity.fetch(version, folder, public_key))
