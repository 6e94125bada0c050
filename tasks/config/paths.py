"""The path of every artifact, relative to the project's root."""

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
        """Folder of `{train,validation,test}.safetensors` and the files that describe them."""
        return self.root / "data/prepared"

    @property
    def manifest(self) -> Path:
        return self.prepared / "manifest.json"

    @property
    def names(self) -> Path:
        """The origin of each prepared image: split -> one name per image, in the order of the images."""
        return self.prepared / "names.json"

    @property
    def quarantine(self) -> Path:
        """The unusable images, each with name, split, class and reason; an empty list if there are none."""
        return self.prepared / "quarantine.json"

    @property
    def baseline(self) -> Path:
        """Statistics of the last accepted data, for drift checks. No DVC out: DVC deletes outs before a stage runs."""
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
        """Folder with the Data Docs and the JSON result of the data validation."""
        return self.reports / "validation"

    @property
    def accepted(self) -> Path:
        """The hash of the data that passed validation. Training depends on this file only, not on limits or layout."""
        return self.validation / "accepted.json"

    @property
    def data_page(self) -> Path:
        """The page about the prepared data: samples, class counts, and the findings of the validation."""
        return self.reports / "data.html"

    @property
    def pretrain_history(self) -> Path:
        return self.reports / "pretrain_history.csv"

    @property
    def train_history(self) -> Path:
        return self.reports / "train_history.csv"

    @property
    def robustness(self) -> Path:
        """All figures of the evaluation; read by the gate and the report."""
        return self.reports / "robustness.json"

    @property
    def metrics(self) -> Path:
        """The main figures, for `dvc metrics show`."""
        return self.reports / "metrics.json"

    @property
    def examples(self) -> Path:
        return self.reports / "examples.parquet"

    @property
    def gallery(self) -> Path:
        """Clean and adversarial images for the report."""
        return self.reports / "gallery.safetensors"

    @property
    def comparison(self) -> Path:
        """The target compared with the champion, image by image. The report depends on its folder, which git tracks."""
        return self.reports / "champion/comparison.json"

    @property
    def decision(self) -> Path:
        """The gate's last decision, rule by rule. No DVC out: it is written after the stages."""
        return self.reports / "decision.json"

    @property
    def decision_page(self) -> Path:
        """The decision for people. The report links to it: the gate judges after the report is made."""
        return self.reports / "decision.html"

    @property
    def report(self) -> Path:
        return self.reports / "report.html"

    @property
    def model_card(self) -> Path:
        return self.reports / "model_card.md"

    @property
    def state(self) -> Path:
        """Folder of resumable training states, each in a subfolder named by a hash of what it depends on."""
        return self.root / "state"

    @property
    def dvc_lock(self) -> Path:
        return self.root / "dvc.lock"
