"""Where every artifact lies, relative to the project's root."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The artifacts of one checkout. Tests pass a temporary `root`."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def prepared(self) -> Path:
        """Folder of `train.safetensors`, `validation.safetensors`, `test.safetensors` and what describes them."""
        return self.root / "data/prepared"

    @property
    def manifest(self) -> Path:
        return self.prepared / "manifest.json"

    @property
    def names(self) -> Path:
        """Where each prepared image came from: split -> one name for each image, in order."""
        return self.prepared / "names.json"

    @property
    def quarantine(self) -> Path:
        """The images that were set aside, each with name, split, class and reason; an empty list if there are none."""
        return self.prepared / "quarantine.json"

    @property
    def baseline(self) -> Path:
        """What the last accepted data looked like, for the next ones to be compared with; no out, so it stays."""
        return self.root / "data/baseline.json"

    @property
    def guidance(self) -> Path:
        return self.root / "models/guidance.safetensors"

    @property
    def target(self) -> Path:
        return self.root / "models/target.safetensors"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def validation(self) -> Path:
        """Folder of the data validation's Data Docs, JSON and Markdown."""
        return self.reports / "validation"

    @property
    def accepted(self) -> Path:
        """Says which data passed the validation; training depends on it, not on the limits or on how it looks."""
        return self.validation / "accepted.json"

    @property
    def data_page(self) -> Path:
        """The prepared data for people: samples, shares, and what the validation found."""
        return self.reports / "data.html"

    @property
    def pretrain_history(self) -> Path:
        return self.reports / "pretrain_history.csv"

    @property
    def train_history(self) -> Path:
        return self.reports / "train_history.csv"

    @property
    def robustness(self) -> Path:
        """All figures of the evaluation; the gate and the report read it."""
        return self.reports / "robustness.json"

    @property
    def metrics(self) -> Path:
        """The few figures that `dvc metrics show` compares."""
        return self.reports / "metrics.json"

    @property
    def examples(self) -> Path:
        return self.reports / "examples.parquet"

    @property
    def gallery(self) -> Path:
        """Clean and adversarial images that the report shows."""
        return self.reports / "gallery.safetensors"

    @property
    def comparison(self) -> Path:
        """The target beside the champion, image by image; git keeps its folder, which the report depends on."""
        return self.reports / "champion/comparison.json"

    @property
    def report(self) -> Path:
        return self.reports / "report.html"

    @property
    def model_card(self) -> Path:
        return self.reports / "model_card.md"

    @property
    def state(self) -> Path:
        """Folder of the states of trainings under way, each in a folder named by what it depends on."""
        return self.root / "state"

    @property
    def dvc_lock(self) -> Path:
        return self.root / "dvc.lock"
