"""The schema of provenance.json, one of the files of a version: what it was made of, by whom and where.

With `dvc.lock`, `params.yaml` and the diffs beside it, it is all that `d2r reproduce` needs, besides a repository that
has the commit and a DVC cache or remote that has the data.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from d2r_core.errors import UserError
from tasks.tracking.environment import Environment

FILE = "provenance.json"


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Code(_Schema):
    commit: str
    dirty: bool
    diff: str | None = None  # the name of the file with the difference; None: nothing but settings differed
    diff_redacted: bool = False  # credentials were removed from it, so it cannot be restored


class Origin(_Schema):
    """Which code ran, and where."""

    # None: trained by a release that recorded the commit alone, or none of it.
    code: Code | None
    environment: Environment | None


class RawData(_Schema):
    path: str  # as in params.yaml
    md5: str | None  # as in dvc.lock
    dvc_file: str | None  # that versions it


class PreparedData(_Schema):
    hash: str
    source: str
    classes: int
    images: dict[str, int]  # by split


class Validation(_Schema):
    success: bool
    expectations: int
    failed: tuple[str, ...]


class TrainedModel(_Schema):
    weights_sha256: str
    git_commit: str | None
    mlflow_run_id: str | None
    metrics: dict[str, float]  # of the selected epoch, on the validation images


class Evaluation(_Schema):
    """The record of this evaluation alone; its figures are in robustness.json."""

    settings_hash: str  # of the seed and the section `evaluate`
    device: str
    precision: str
    run_folder: str  # among the artifacts of the MLflow run
    robustness_sha256: str
    examples_sha256: str


class Storage(_Schema):
    """DVC's default remote, and whether it had what `d2r reproduce` fetches when the version was registered."""

    remote: str | None
    url: str | None  # without credentials
    pushed: Literal["yes", "no", "unknown"]


class PrefectRun(_Schema):
    id: str
    name: str


class Provenance(_Schema):
    """provenance.json."""

    version: Literal[1] = 1
    # Training and registration may have been different processes; the figures are of the code that registered.
    training: Origin
    registration: Origin
    seed: int  # of the settings: every random draw of every stage derives from it
    settings_hash: str  # of everything that the weights depend on
    raw_data: RawData | None  # None: there is no dvc.lock
    data: PreparedData
    validation: Validation | None  # None: there is no record of it
    guidance: TrainedModel | None
    target: TrainedModel
    evaluation: Evaluation
    storage: Storage
    prefect_run: PrefectRun | None  # None: not registered by a flow

    @classmethod
    def read(cls, folder: Path, name: str) -> "Provenance":
        """Read the provenance among the verified files of a version.

        Args:
            name: of the version, for messages.

        Raises:
            UserError: the version has none, or in a format that this release does not read.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{name} has no provenance: an older release registered it. What it came from cannot be shown or "
                "reproduced. `d2r run` registers a model with provenance after its next training or evaluation."
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{name}: its {FILE} is in a format that this release does not read ({where}: {first['msg']})."
            ) from None
