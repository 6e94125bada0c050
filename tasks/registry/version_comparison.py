"""Two versions of the registered model side by side, image by image, from their verified records."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from d2r_core.errors import UserError
from d2r_core.evaluation.statistics import paired_score_interval, sign_test
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import AttackFigures, RobustnessReport
from tasks.registry import paired, signing, version_files
from tasks.registry.version_files import VersionFiles
from tasks.registry.versions import connect, get_referenced
from tasks.tracking import runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Sections of the settings that were those of the training; the evaluation may have been made with other ones.
_TRAINING = ("seed", "prepare.", "validate.", "pretrain.", "train.")


class ChangedImages(NamedTuple):
    """Images of one class that only one of the two classifies correctly, by their number in the test split."""

    label: str
    only_a: list[int]
    only_b: list[int]


class AttackPair(NamedTuple):
    """A and B under one attack on the same images: all of them, or those of one class."""

    name: str  # of the attack or of the class, for people
    images: int
    a: float  # accuracies
    b: float
    difference: float  # of A minus B
    interval: tuple[float, float]  # of the difference: 95 % score interval of paired proportions
    only_a: int  # images that only A classifies correctly
    only_b: int
    p: float  # McNemar's exact two-sided test
    changed: list[ChangedImages]


class Difference(NamedTuple):
    """A setting or fact in which the two differ, as text; empty where a version does not have it."""

    name: str
    a: str
    b: str


class VersionComparison(NamedTuple):
    model_name: str
    a: int
    b: int
    attacks: list[AttackPair]
    classes: list[AttackPair]  # each class under the last of `attacks`: the worst one, if that is compared
    left_out: list[str]  # why an attack was not compared, a sentence each
    differences: list[Difference]


def compare(settings: Settings, paths: Paths, references: tuple[str, str]) -> VersionComparison:
    """Compare two versions that were measured on the same test images, under the attacks that were the same.

    Args:
        references: A and B, as numbers or aliases.

    Raises:
        UserError: the two are one version, there is no such version, its files are not the ones that were registered,
            or the two were measured on different data.
    """
    name, public_key = settings.promote.model_name, signing.trusted_key(settings, paths)
    with connect(settings, paths) as client, tempfile.TemporaryDirectory() as folder:
        registered = [get_referenced(client, name, reference) for reference in references]
        a, b = (int(version.version) for version in registered)
        if a == b:
            raise UserError("Name two different versions; `d2r models` lists them.")
        sides = [version_files.read(version, Path(folder, str(version.version)), public_key) for version in registered]
        reports, examples = zip(*(side.evaluation() for side in sides), strict=True)
        if reports[0].data.hash != reports[1].data.hash:
            raise UserError(
                f"Versions {a} and {b} were measured on different data ({reports[0].data.hash[:12]} and "
                f"{reports[1].data.hash[:12]}): which test images they share is not recorded, so they cannot be "
                "compared image by image. `d2r evaluate` measures each on images of your choice."
            )
        attacks, classes, left_out = _attacks(reports, examples, sides[0].metadata["classes"])
        differences = list(_differences(client, sides, reports))
    return VersionComparison(name, a, b, attacks, classes, left_out, differences)


def _attacks(
    reports: tuple[RobustnessReport, RobustnessReport], examples: tuple[pd.DataFrame, pd.DataFrame], classes: list[str]
) -> tuple[list[AttackPair], list[AttackPair], list[str]]:
    """Under each attack that is compared, in each class under the last, and for every other attack the reason."""
    figures = [report.target.attacks for report in reports]
    same_precision = reports[0].precision == reports[1].precision
    left_out = []
    compared = []
    for key in dict.fromkeys([*figures[0], *figures[1]]):
        reason = _reason(key, [attacks.get(key) for attacks in figures], same_precision)
        if reason is None:
            compared.append(key)
        elif key != "worst":
            left_out.append(reason)
    images = examples[0]["index"].nunique()
    rows = [side[side["attack"].isin(compared)] for side in examples]
    pairs = paired.pair(rows[0], rows[1], images)
    # The worst attack is that of all which ran on every image: other ones, another worst.
    on_all = [set(side.groupby("attack").size().loc[lambda size: size == images].index) for side in examples]
    if not on_all[0] == on_all[1] <= {*compared}:
        compared = [key for key in compared if key != "worst"]
        left_out.append("The worst attack: not all attacks of which it is the worst are the same.")
    compared.sort(key="worst".__eq__)  # last
    labels = examples[0].drop_duplicates("index").set_index("index")["label"].map(lambda label: classes[label])
    compared = [key for key in compared if key in pairs]
    last = pairs[compared[-1]]
    members = {label: last[labels.loc[last.index] == label] for label in classes}
    by_class = [_pair(label, rows_of, labels) for label, rows_of in members.items() if len(rows_of)]
    return [_pair(figures[0][key].name, pairs[key], labels) for key in compared], by_class, left_out


def _reason(key: str, figures: list[AttackFigures | None], same_precision: bool) -> str | None:
    """Why an attack on A is not the attack on B; None if it is."""
    a, b = figures
    if a is None or b is None:
        return f"{key}: only one of the two was attacked so."
    if key == "clean":
        return None
    if not same_precision:
        return f"{a.name}: measured in different precisions."
    fields = ("name", "norm", "eps", "step_size", "steps", "restarts", "seed")
    different = [field for field in fields if getattr(a, field) != getattr(b, field)]
    if _cascade(a) != _cascade(b):
        different.append("its attacks")
    return f"{a.name}: {', '.join(different)} {'differs' if len(different) == 1 else 'differ'}." if different else None


def _cascade(figures: AttackFigures) -> list[str]:
    return [attack.name for attack in figures.attacks or ()]


def _pair(name: str, pairs: pd.DataFrame, labels: "pd.Series[str]") -> AttackPair:
    """Out of the rows that `paired.pair` makes: A is its challenger."""
    a, b = pairs["challenger"], pairs["champion"]
    only_a, only_b = (sorted(int(image) for image in pairs.index[side]) for side in (a & ~b, b & ~a))
    changed = [
        ChangedImages(label, *([image for image in side if labels.loc[image] == label] for side in (only_a, only_b)))
        for label in dict.fromkeys(labels.loc[sorted([*only_a, *only_b])])
    ]
    counts = len(only_a), len(only_b)
    return AttackPair(
        name=name,
        images=len(pairs),
        a=float(a.mean()),
        b=float(b.mean()),
        difference=(counts[0] - counts[1]) / len(pairs),
        interval=paired_score_interval(*counts, len(pairs)),
        only_a=counts[0],
        only_b=counts[1],
        p=min(1.0, 2 * sign_test(max(counts), min(counts))),
        changed=changed,
    )


def _differences(
    client: "MlflowClient", sides: list[VersionFiles], reports: tuple[RobustnessReport, RobustnessReport]
) -> Iterator[Difference]:
    """Of the verified files; and of the settings that MLflow's runs of the trainings recorded."""
    for facts in ([_facts(*side) for side in zip(sides, reports, strict=True)], [_trained(client, s) for s in sides]):
        a, b = facts
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key):
                yield Difference(key, str(a.get(key, "")), str(b.get(key, "")))


def _facts(side: VersionFiles, report: RobustnessReport) -> dict[str, Any]:
    skipped = ("classes", "architecture", "mlflow_run_id")
    metadata = {key: value for key, value in side.metadata.items() if key not in skipped}
    evaluation = {key: getattr(report, key) for key in ("seed", "norm", "precision", "device", "settings_hash")}
    return {
        **metadata,
        **_flat("architecture", side.metadata["architecture"]),
        **_flat("evaluation", evaluation),
    }


def _flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in values.items()}


def _trained(client: "MlflowClient", side: VersionFiles) -> dict[str, str]:
    """The settings of the training, as its run recorded them; nothing if the server does not have the run any more."""
    run = runs.find(client, side.version.run_id) if side.version.run_id else None
    return {} if run is None else {key: value for key, value in run.data.params.items() if key.startswith(_TRAINING)}
