"""What the gate decided about a version, rule by rule (reports/decision.json), and a person. Without PyTorch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d2r_core import files
from d2r_core.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Outcome = Literal["passed", "failed", "undecided"]  # undecided: skipped, or too few images; does not block


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Schema):
    """One rule of the gate, applied to one version."""

    name: str
    verdict: Outcome
    reason: str  # one sentence, for people
    figures: dict[str, float] = Field(default_factory=dict)
    # Of challenger minus champion; each end at the one-sided `confidence`.
    interval: tuple[float, float] | None = None


class Decision(_Schema):
    """reports/decision.json, and the tag `decision` of the version."""

    model_name: str
    version: int
    passed: bool
    weights_sha256: str  # these three: of the version
    data_hash: str
    evaluation_hash: str
    champion: int | None  # None: there was none
    champion_predictions: Literal["recorded", "attacked again"] | None  # None: not compared
    confidence: float
    margin: float
    rules: tuple[Rule, ...]

    @classmethod
    def read(cls, path: Path) -> "Decision":
        """Read decision.json.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UserError(
                f"{path}: cannot be read ({problem}). Remove it; the gate writes it anew: `d2r run`."
            ) from None

    def write(self, path: Path) -> None:
        """Write decision.json atomically."""
        files.write_text(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it passed, or which rules failed."""
        return tuple(rule.reason for rule in self.rules if self.passed or rule.verdict == "failed")


class Approval(_Schema):
    """The tag `approval` of a version: what a person decided, where `promote.approval` is manual or one was asked."""

    state: Literal["waiting", "approved", "rejected", "expired"]
    who: str = ""  # who answered; of "waiting" and "expired", who asks: the user and the Prefect flow run
    reason: str = ""
    time: str  # UTC, ISO 8601: of the answer, or the end of the wait for it

    @classmethod
    def of(cls, version: "ModelVersion") -> "Approval | None":
        """The decision about a version; None if nobody was asked."""
        tag = version.tags.get("approval")
        return None if tag is None else cls.model_validate_json(tag)

    def sentence(self, version: int) -> str:
        """For people, with what they can do."""
        time = f"{self.time[:16].replace('T', ' ')} UTC"
        command = f"`d2r approve {version} --reason TEXT`"
        match self.state:
            case "approved":
                return f"Approved by {self.who} at {time}: {self.reason}"
            case "rejected":
                return f"Rejected by {self.who} at {time}: {self.reason.rstrip('.')}. {command} overrules it."
            case "waiting":
                return (
                    f"Version {version} waits until {time} for approval ({self.who}). {command} makes it @champion, "
                    "and --reject leaves the champion. Prefect's UI asks for the same."
                )
        return f"Nobody approved it by {time}, so the champion stays. {command} makes it @champion."
