"""The model registry: what was evaluated is registered as @challenger, gated, promoted to @champion, rolled back."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2r_core import checkpoint, data, runtime
from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.registry import model_logging
from tasks.registry.model_logging import Recorded
from tasks.tracking import connection, errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Two versions that agree in these are one.
_IDENTITY = ("weights_sha256", "data_hash", "evaluation_hash")


class Verdict(NamedTuple):
    """What the gate says of a version: each reason is a sentence with its figures."""

    passed: bool
    reasons: tuple[str, ...]


def register(settings: Settings, paths: Paths) -> int:
    """Register the evaluated target model and make it @challenger; returns its version.

    Figures, files and the servable model go to the run that trained it, or, where this server does not know that
    run, to a new one made from the files. The version is created last: a failure before leaves none. A model that is
    registered already, with the same data and evaluation, keeps its version.

    Raises:
        UserError: an artifact is missing, or the artifacts do not belong together.
    """
    metadata, robustness = _evaluated(paths)
    attacks, checks = (robustness["models"]["target"][key] for key in ("attacks", "checks"))
    tags = {
        "git_commit": metadata["git_commit"],
        "git_dirty": str(metadata["git_dirty"]).lower(),
        "data_hash": metadata["data_hash"],
        "settings_hash": metadata["settings_hash"],
        "weights_sha256": metadata["weights_sha256"],
        "evaluation_hash": robustness["settings_hash"],
        "clean_accuracy": str(attacks["clean"]["accuracy"]),
        "robust_accuracy": str(attacks["worst"]["accuracy"]),
        "eps": str(attacks["worst"]["eps"]),
        "checks": ", ".join(check["key"] for check in checks if check["passed"] is False) or "passed",
        "checks_not_passed": json.dumps([check for check in checks if check["passed"] is not True]),
    }
    if "autoattack" in attacks:
        tags["autoattack"] = "{name} on {images} images".format(**attacks["autoattack"])
        tags["autoattack_accuracy"] = str(attacks["autoattack"]["accuracy"])
    name = settings.promote.model_name
    with _client(settings, paths) as client:
        version = _registered(client, name, tags)
        if version is None:
            recorded = model_logging.record(client, settings, paths, metadata, robustness)
            version = _create_version(client, name, recorded, tags)
        client.set_registered_model_alias(name, "challenger", str(version))
    return version


def gate(settings: Settings, paths: Paths, version: int) -> Verdict:
    """Judge a version by its self-checks, the floors of `promote` and the champion; tag it with the verdict.

    A failed self-check refuses it: its figures may be too high. One that could not be asked is told among the reasons.
    The champion's recorded figure is used if it stands on the same data and evaluation; otherwise the champion is
    attacked anew on the present test images.

    Raises:
        UserError: the version is unknown, or the champion's checkpoint cannot be had.
    """
    limits = settings.promote
    with _client(settings, paths) as client:
        challenger = client.get_model_version(limits.model_name, str(version))
        if "robust_accuracy" not in challenger.tags:
            raise UserError(f"{limits.model_name} version {version} has no figures: it was not registered by `d2r`.")
        clean, robust = (float(challenger.tags[f"{kind}_accuracy"]) for kind in ("clean", "robust"))
        judged = [
            _floor("Clean accuracy", clean, limits.min_clean_accuracy, "promote.min_clean_accuracy"),
            _floor(
                f"Robust accuracy (worst attack, eps {float(challenger.tags['eps']):.4g})",
                robust,
                limits.min_robust_accuracy,
                "promote.min_robust_accuracy",
            ),
            *_self_checks(challenger),
        ]
        if "autoattack" in challenger.tags:
            # PGD and CW alone are an upper bound, and how high it lies differs from model to model.
            found = float(challenger.tags["autoattack_accuracy"])
            what = f"Accuracy under {challenger.tags['autoattack']}"
            judged.append(_floor(what, found, limits.min_robust_accuracy, "promote.min_robust_accuracy"))
        champion_version = _alias(client, limits.model_name, "champion")
        if champion_version == version:
            judged.append((True, "It is the champion itself."))
        elif champion_version is None:
            judged.append((True, "There is no champion to compare with."))
        else:
            holder = client.get_model_version(limits.model_name, str(champion_version))
            judged.append(_comparison(client, settings, paths, challenger, holder))
        passed = all(ok for ok, _ in judged)
        verdict = Verdict(passed, tuple(sentence for ok, sentence in judged if ok == passed))
        client.set_model_version_tag(limits.model_name, str(version), "gate", "passed" if passed else "failed")
        client.set_model_version_tag(limits.model_name, str(version), "gate_settings", settings.hash("promote"))
        client.set_model_version_tag(limits.model_name, str(version), "gate_reasons", "\n".join(verdict.reasons))
    return verdict


def promote(settings: Settings, paths: Paths, version: int) -> None:
    """Move @champion to `version`, which remembers the previous champion for `rollback`."""
    name = settings.promote.model_name
    with _client(settings, paths) as client:
        current = _alias(client, name, "champion")
        if current == version:
            return
        if current is not None:
            client.set_model_version_tag(name, str(version), "previous_champion", str(current))
        client.set_registered_model_alias(name, "champion", str(version))


def rollback(settings: Settings, paths: Paths) -> int:
    """Move @champion back to the version that held it before; returns that version.

    Raises:
        UserError: there is no champion, or none before it.
    """
    name = settings.promote.model_name
    with _client(settings, paths) as client:
        current = _alias(client, name, "champion")
        if current is None:
            raise UserError(f"{name} has no champion: there is nothing to roll back.")
        previous = client.get_model_version(name, str(current)).tags.get("previous_champion")
        if previous is None:
            raise UserError(f"{name} version {current} is the first champion: there is none to roll back to.")
        client.set_registered_model_alias(name, "champion", previous)
    return int(previous)


def champion(settings: Settings, paths: Paths) -> int | None:
    """The version that is @champion, if any."""
    with _client(settings, paths) as client:
        return _alias(client, settings.promote.model_name, "champion")


def download(settings: Settings, paths: Paths, reference: str, folder: Path) -> Path:
    """Bring the checkpoint of `models:/NAME@ALIAS` or `models:/NAME/VERSION` into `folder`; returns its weights' path.

    Raises:
        UserError: the reference is not of that form, there is no such version, or its run has no checkpoint.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@(\w+)|/(\d+))", reference)
    if not parts:
        raise UserError(f"{reference}: write models:/NAME@champion, models:/NAME@challenger or models:/NAME/VERSION.")
    name, alias, number = parts.groups()
    with _client(settings, paths) as client:
        version = _alias(client, name, alias) if alias else int(number)
        found = None if version is None else _version(client, name, version)
        if found is None:
            raise UserError(f"{reference}: there is no such version in MLflow ({settings.tracking.uri}).")
        _fetch(client, found, "target.json", str(folder))
        return _fetch(client, found, "target.safetensors", str(folder))


@contextmanager
def _client(settings: Settings, paths: Paths) -> Iterator["MlflowClient"]:
    """MLflow's client; what the server refuses inside the block becomes one message."""
    connection.configure(settings, paths)
    import mlflow

    with errors.readable_errors():
        yield mlflow.MlflowClient()


def _evaluated(paths: Paths) -> tuple[dict[str, Any], dict[str, Any]]:
    """The target checkpoint's JSON and robustness.json, once everything is there and belongs together."""
    for path in (paths.report, paths.model_card, paths.robustness, paths.examples, paths.validation, paths.target):
        if not path.exists():
            raise UserError(f"{path} is missing. `d2r run` makes it.")
    metadata = checkpoint.read_metadata(paths.target)
    robustness = json.loads(paths.robustness.read_text(encoding="utf-8"))
    if robustness["models"]["target"]["weights_sha256"] != metadata["weights_sha256"]:
        raise UserError(f"{paths.robustness}: was measured on other weights than {paths.target}. Run `dvc repro`.")
    if not robustness["data"]["hash"] == metadata["data_hash"] == read_manifest(paths)["hash"]:
        raise UserError(
            f"{paths.robustness}, {paths.target} and {paths.manifest} are of different data. Run `dvc repro`."
        )
    return metadata, robustness


def _registered(client: "MlflowClient", name: str, tags: dict[str, str]) -> int | None:
    """The newest version with that identity."""
    identity = " and ".join(f"tags.{key} = '{tags[key]}'" for key in _IDENTITY)
    found = client.search_model_versions(f"name = '{name}' and {identity}")
    return max((int(version.version) for version in found), default=None)


def _create_version(client: "MlflowClient", name: str, recorded: Recorded, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{recorded.model_id}"
    version = client.create_model_version(name, source, recorded.run_id, tags=tags, model_id=recorded.model_id)
    return int(version.version)


def _alias(client: "MlflowClient", name: str, alias: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if version is None else int(version)


def _version(client: "MlflowClient", name: str, version: int) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _floor(what: str, accuracy: float, floor: float, key: str) -> tuple[bool, str]:
    ok = accuracy >= floor
    return ok, f"{what} {accuracy:.2%} {'reaches' if ok else 'is below'} the floor of {floor:.2%} ({key})."


def _self_checks(version: "ModelVersion") -> list[tuple[bool, str]]:
    """What the evaluation found when it looked for reasons to distrust itself."""
    if "checks" not in version.tags:
        return [(False, "No self-checks were recorded with its figures. Evaluate it anew: `d2r run`.")]
    sentences = [
        (
            check["passed"] is None,
            f"Self-check {'not asked' if check['passed'] is None else 'failed'}: {check['name']}. {check['found']} "
            f"See docs/evaluation.md#{check['key'].replace('_', '-')}.",
        )
        for check in json.loads(version.tags["checks_not_passed"])
    ]
    return sentences or [(True, "All self-checks passed.")]


def _comparison(
    client: "MlflowClient", settings: Settings, paths: Paths, challenger: "ModelVersion", holder: "ModelVersion"
) -> tuple[bool, str]:
    """Whether the challenger is as robust as the champion, both on the challenger's data."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        described = checkpoint.read_metadata(_fetch(client, challenger, "target.json", ours))
        champions = checkpoint.read_metadata(_fetch(client, holder, "target.json", theirs))
        for what, found, other in (
            ("class list", described["classes"], champions["classes"]),
            ("image size", described["architecture"]["image_size"], champions["architecture"]["image_size"]),
        ):
            if found != other:
                return False, (
                    f"Its {what} is not that of the champion (version {holder.version}), {_short(found)} against "
                    f"{_short(other)}, so the two cannot be compared. Promote it by hand, or choose another "
                    "promote.model_name."
                )
        if all(challenger.tags[key] == holder.tags.get(key) for key in ("data_hash", "evaluation_hash")):
            accuracy, how = float(holder.tags["robust_accuracy"]), "as recorded on the same data"
        else:
            weights = _fetch(client, holder, "target.safetensors", theirs)
            accuracy, how = _robust_accuracy_here(settings, paths, challenger, weights), "measured anew on this data"
    robust, allowed = float(challenger.tags["robust_accuracy"]), settings.promote.max_regression
    ok = robust >= accuracy - allowed - 1e-9  # the subtraction's rounding must not decide
    return ok, (
        f"Robust accuracy {robust:.2%} {'holds against' if ok else 'falls behind'} the champion's {accuracy:.2%} "
        f"(version {holder.version}, {how}; promote.max_regression is {allowed:.2%})."
    )


def _fetch(client: "MlflowClient", version: "ModelVersion", file: str, folder: str) -> Path:
    """Download one file of a version's checkpoint into `folder`."""
    path = f"checkpoint/{file}"
    if not version.run_id or path not in {found.path for found in client.list_artifacts(version.run_id, "checkpoint")}:
        raise UserError(
            f"{version.name} version {version.version} has no {path} in its run, so nothing can be compared with it. "
            "Promote by hand, or choose another promote.model_name."
        )
    return Path(client.download_artifacts(version.run_id, path, folder))


def _robust_accuracy_here(settings: Settings, paths: Paths, challenger: "ModelVersion", weights: Path) -> float:
    """Attack the model at `weights` on the present test images, on which the challenger was measured."""
    from tasks.evaluation.evaluate_model import measure

    present = {"data_hash": read_manifest(paths)["hash"], "evaluation_hash": settings.hash("seed", "evaluate")}
    if any(challenger.tags[key] != value for key, value in present.items()):
        raise UserError(
            f"{challenger.name} version {challenger.version} was measured on other data or with other `evaluate` "
            "settings than lie here, so the champion cannot be measured beside it. Run `d2r run`."
        )
    model, described = checkpoint.load(weights, runtime.device(settings.runtime.device))
    test = data.load_split(paths.prepared / "test.safetensors")
    attacks = settings.evaluate
    if attacks.autoattack_images < len(test):  # then it is no part of the worst of all images
        attacks = attacks.model_copy(update={"autoattack_images": 0})
    measured = measure(
        model, test, attacks, classes=len(described["classes"]), seed=settings.seed, description="champion"
    )
    return float(measured.figures["worst"]["accuracy"])


def _short(found: object) -> str:
    return f"{len(found)} classes ({', '.join(found[:3])}, ...)" if isinstance(found, list) else f"{found} pixels"
