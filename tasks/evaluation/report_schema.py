"""The schemas of reports/robustness.json and of reports/champion/comparison.json, for everything that reads them.

Without PyTorch, so that the command line answers soon.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from d2r_core.errors import UserError

VERSION = 1  # of robustness.json; to be raised when a file of before can no longer be read

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Interval = tuple[float, float]  # 95 %


class _Schema(BaseModel):
    # By name too, where the file's key (the alias) is not the attribute's name.
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Accuracy(_Schema):
    """An accuracy and what it was counted from."""

    accuracy: Share
    interval: Interval  # Wilson
    correct: int
    images: int


class CascadeFigure(_Schema):
    """The accuracy left by one attack of a cascade and all those before it."""

    name: str
    accuracy: Share


class AttackFigures(Accuracy):
    """One model under one attack."""

    name: str  # for people
    norm: Literal["Linf", "L2"]
    eps: float  # in units of images in [0, 1]; 0 for clean images
    seed: int
    step_size: float | None  # these three are None for AutoAttack, which sets them itself
    steps: int | None
    restarts: int | None
    attacks: tuple[CascadeFigure, ...] | None = Field(None, alias="stages")  # of AutoAttack, in their order
    per_class: tuple[Share | None, ...]  # accuracy; None for a class without an image


class EpsPoint(Accuracy):
    eps: float


class StepsPoint(Accuracy):
    steps: int


class MedianPerturbation(_Schema):
    """The median over the images of the smallest perturbation that misleads the model, from the curve against eps."""

    value: float
    above: float  # the radii of the curve between which it is interpolated
    at_most: float


class Curves(_Schema):
    """Accuracy under PGD, ascending in what it is drawn against."""

    eps: tuple[EpsPoint, ...]
    steps: tuple[StepsPoint, ...]
    median_perturbation: MedianPerturbation | None = None  # None: beyond the curve


class AttackCost(_Schema):
    """What an attack took to make its images, on all processes together; the passes are those of single images."""

    forward_passes: int
    backward_passes: int
    seconds: float


class SelfCheck(_Schema):
    """One self-check of the evaluation; docs/evaluation.md explains each under its key."""

    key: str
    name: str  # what is expected
    passed: bool | None  # None: skipped
    message: str = Field(alias="found")  # one sentence with the figures


class Confusion(_Schema):
    attack: str  # its key in `attacks`
    counts: tuple[tuple[int, ...], ...]  # rows labels, columns predictions


class Data(_Schema):
    """The test images."""

    source: str
    hash: str
    classes: tuple[str, ...]
    test_images: int


def _holds(*keys: str) -> AfterValidator:
    def check(mapping: dict[str, Any]) -> dict[str, Any]:
        missing = [key for key in keys if key not in mapping]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        return mapping

    return AfterValidator(check)


class EvaluatedModel(_Schema):
    architecture: dict[str, Any]  # as models.build takes it
    weights_sha256: str
    attacks: Annotated[dict[str, AttackFigures], _holds("clean", "pgd", "worst")]  # "autoattack" where it was run
    costs: dict[str, AttackCost] = {}  # by the keys of `attacks`, without "clean" and "worst"
    checks: tuple[SelfCheck, ...]
    curves: Curves
    confusion: Confusion


class Identity(_Schema):
    """What makes two evaluated models one: the same weights, measured on the same data with the same settings."""

    weights_sha256: str
    data_hash: str
    evaluation_hash: str  # of the settings that the figures depend on: the seed and the section `evaluate`

    def same_evaluation(self, other: "Identity") -> bool:
        """Whether the figures of the two may be compared."""
        return (self.data_hash, self.evaluation_hash) == (other.data_hash, other.evaluation_hash)


class RobustnessReport(_Schema):
    """reports/robustness.json."""

    version: Literal[1]  # VERSION
    data: Data
    seed: int
    precision: Literal["fp32", "tf32", "bf16"]
    device: str
    norm: Literal["Linf", "L2"]
    models: Annotated[dict[str, EvaluatedModel], _holds("target")]  # and "guidance", where a chain was evaluated
    settings_hash: str  # of the seed and the section `evaluate`
    checkpoint: str | None = None  # as `d2r evaluate` was given it; None for a chain's own models
    warnings: tuple[str, ...] = ()  # sentences about the target, such as an accuracy near chance

    @classmethod
    def read(cls, path: Path) -> "RobustnessReport":
        """Read robustness.json.

        Raises:
            UserError: the file is missing, damaged, or of another version.
        """
        remedy = "`d2r stage evaluate` writes it anew."
        content = _json(path, remedy)
        version = content.get("version")
        if version != VERSION:
            raise UserError(
                f"{path}: cannot be read (it has {f'version {version}' if version else 'no version'}, and this release "
                f"reads version {VERSION}). {remedy}"
            )
        return _validated(cls, content, path, remedy)

    def json_text(self) -> str:
        """The content of the file."""
        # Without the keys that do not apply. Not model_dump_json, which writes floats otherwise than Python does.
        return json.dumps(self.model_dump(mode="json", by_alias=True, exclude_unset=True), indent=2) + "\n"

    @property
    def target(self) -> EvaluatedModel:
        return self.models["target"]

    @property
    def identity(self) -> Identity:
        """Of the evaluated target."""
        return Identity(
            weights_sha256=self.target.weights_sha256, data_hash=self.data.hash, evaluation_hash=self.settings_hash
        )


class Weights(_Schema):
    weights_sha256: str


class Champion(_Schema):
    version: int
    weights_sha256: str | None  # None: not registered by `d2r`


class AttackComparison(_Schema):
    """Challenger and champion on the same images under one attack."""

    name: str
    images: int
    challenger: Share  # accuracies
    champion: Share
    difference: float
    interval: Interval  # of the difference; paired bootstrap
    only_challenger: int  # images that only the challenger classifies correctly
    only_champion: int


class ChampionComparison(_Schema):
    """reports/champion/comparison.json: `attacks`, or the reason why there are none."""

    champion: Champion | None = None
    challenger: Weights
    data_hash: str
    evaluation_hash: str
    attacks: dict[str, AttackComparison] | None = None
    reason: str | None = None

    @classmethod
    def read(cls, path: Path) -> "ChampionComparison":
        """Read comparison.json.

        Raises:
            UserError: the file is missing or damaged.
        """
        remedy = "Remove it; `d2r run` writes it anew."
        return _validated(cls, _json(path, remedy), path, remedy)

    @property
    def identity(self) -> Identity:
        """Of the challenger."""
        return Identity(
            weights_sha256=self.challenger.weights_sha256,
            data_hash=self.data_hash,
            evaluation_hash=self.evaluation_hash,
        )


S = TypeVar("S", bound=_Schema)


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read (it holds no JSON object). {remedy}")
    return content


def _validated(schema: type[S], content: dict[str, Any], path: Path, remedy: str) -> S:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: cannot be read ({where}: {first['msg']}). {remedy}") from None
