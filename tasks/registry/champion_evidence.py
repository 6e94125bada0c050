"""What the gate compares: challenger and champion on the same images under the same attacks.

The champion's recorded predictions are used if they come from the same data and evaluation; otherwise the champion is
attacked anew on the present test images, without those that it was trained on.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd

from d2r_core import checkpoint, data, runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.registry import gate_rules, paired, signing, training_images, version_files
from tasks.registry.decision import Rule
from tasks.registry.gate_rules import Evidence
from tasks.registry.status import identity_of
from tasks.registry.version_files import VersionFiles

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BY_HAND = "Promote it by hand (`d2r promote --force`), or choose another promote.model_name."


class Comparison(NamedTuple):
    """The rules about the champion, and where its predictions come from."""

    rules: list[Rule]
    predictions: Literal["recorded", "attacked again"] | None = None  # None: nothing was compared


def compare(
    client: "MlflowClient", settings: Settings, paths: Paths, challenger: VersionFiles, champion_version: int | None
) -> Comparison:
    """The challenger beside the champion, both on the challenger's test images.

    Raises:
        UserError: the champion would have to be attacked again, and the data or settings of the challenger are not the
            present ones.
    """
    if champion_version is None:
        return Comparison([_champion_rule(True, "There is no champion to compare with.")])
    if champion_version == int(challenger.version.version):
        return Comparison([_champion_rule(True, "It is the champion itself.")])
    with tempfile.TemporaryDirectory() as folder:
        try:
            registered = client.get_model_version(challenger.version.name, str(champion_version))
            champion = version_files.read(registered, Path(folder), signing.trusted_key(settings, paths))
        except UserError as error:
            return Comparison([_champion_rule(False, f"It cannot be compared with the champion. {error} {_BY_HAND}")])
        difference = _difference(challenger, champion)
        if difference:
            return Comparison([_champion_rule(False, difference)])
        return _compare(settings, paths, challenger, champion)


def _difference(challenger: VersionFiles, champion: VersionFiles) -> str | None:
    """Why the two models cannot be shown the same images, if they cannot."""
    own, other = challenger.metadata, champion.metadata
    for what, value, champions in (
        ("class list", own["classes"], other["classes"]),
        ("image size", own["architecture"]["image_size"], other["architecture"]["image_size"]),
    ):
        if value != champions:
            return (
                f"Its {what} is not that of the champion (version {champion.version.version}), {_short(value)} against "
                f"{_short(champions)}, so the two cannot be compared. {_BY_HAND}"
            )
    return None


def _compare(settings: Settings, paths: Paths, challenger: VersionFiles, champion: VersionFiles) -> Comparison:
    _, examples = challenger.evaluation()
    champion_examples, left_out = _recorded(challenger, champion), 0
    predictions: Literal["recorded", "attacked again"] = "recorded"
    if champion_examples is None:
        predictions = "attacked again"
        test = _present_test(settings, paths, challenger)
        seen = training_images.among(champion.folder, test.images)
        left_out = int(seen.sum())
        if left_out == len(test):
            reason = f"The champion was trained on all {left_out} test images, so the two cannot be compared."
            return Comparison([_champion_rule(False, f"{reason} {_BY_HAND}")])
        champion_examples = _attack_again(settings, test, champion.weights)
        examples, champion_examples = (
            rows[~rows["index"].isin(seen.nonzero().flatten().tolist())] for rows in (examples, champion_examples)
        )
    note = f", without {left_out} test images that it was trained on" if left_out else ""
    evidence = Evidence(
        pairs=paired.pair(examples, champion_examples, examples["index"].nunique()),
        labels=examples.drop_duplicates("index").set_index("index")["label"],
        new_data=champion.metadata["data_hash"] != challenger.metadata["data_hash"],
        champion=f"version {champion.version.version}, {predictions}{note}",
        seed=settings.seed,
    )
    return Comparison(gate_rules.against_champion(evidence, settings.promote), predictions)


def _recorded(challenger: VersionFiles, champion: VersionFiles) -> pd.DataFrame | None:
    """The champion's predictions, if it carries those of the data and evaluation of the challenger."""
    if not identity_of(champion.version).same_evaluation(identity_of(challenger.version)):
        return None
    try:
        return champion.evaluation()[1]
    except UserError:  # in the format of another release
        return None


def _present_test(settings: Settings, paths: Paths, challenger: VersionFiles) -> data.Split:
    """The present test images, on which the challenger was measured."""
    present = {"data_hash": read_manifest(paths)["hash"], "evaluation_hash": settings.hash("seed", "evaluate")}
    version = challenger.version
    if identity_of(version) != identity_of(version).model_copy(update=present):
        raise UserError(
            f"{version.name} version {version.version} was measured on other data or with other `evaluate` "
            "settings than the present ones, so the champion cannot be measured beside it. Run `d2r run`."
        )
    return data.load_split(paths.prepared / "test.safetensors")


def _attack_again(settings: Settings, test: data.Split, weights: Path) -> pd.DataFrame:
    """What the model at `weights` says of each image of `test`."""
    from tasks.evaluation.evaluate_model import evaluate_model

    model, metadata = checkpoint.load(weights, runtime.device(settings.runtime.device))
    measured = evaluate_model(
        model,
        test,
        settings.evaluate,
        classes=len(metadata["classes"]),
        seed=settings.seed,
        description="champion",
    )
    return measured.examples.assign(model="target")


def _champion_rule(passed: bool, reason: str) -> Rule:
    return Rule(name="champion", verdict="passed" if passed else "failed", reason=reason)


def _short(value: object) -> str:
    return f"{len(value)} classes ({', '.join(value[:3])}, ...)" if isinstance(value, list) else f"{value} pixels"
