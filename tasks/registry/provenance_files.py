"""Writes what a version carries about its origin: provenance.json, dvc.lock, params.yaml and the diffs of the code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from d2r_core import checkpoint, files
from tasks.config.credentials import redact
from tasks.config.paths import Paths
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import RobustnessReport
from tasks.pipeline import dvc, remote
from tasks.registry.provenance import (
    FILE,
    Code,
    Evaluation,
    Origin,
    PrefectRun,
    PreparedData,
    Provenance,
    RawData,
    Storage,
    TrainedModel,
    Validation,
)
from tasks.tracking.environment import Environment, current_environment
from tasks.tracking.source_code import read_source_code

DIFF, REGISTRATION_DIFF = "code.diff", "registration.diff"
_FETCHED = ("prepare", "validate", "pretrain")  # the stages whose outs a reproduction takes from DVC


def write(paths: Paths, folder: Path, run_folder: str, prefect_run: PrefectRun | None) -> Provenance:
    """Write the provenance of the evaluated target model into `folder`, which becomes part of the version; returns it.

    Args:
        run_folder: where this evaluation's files are among the artifacts of the MLflow run.
        prefect_run: the flow run that registers, if there is one.
    """
    for path in (paths.dvc_lock, paths.params):
        if path.is_file():
            (folder / path.name).write_text(redact(path.read_text(encoding="utf-8")), encoding="utf-8")
    target = checkpoint.read_metadata(paths.target)
    robustness = RobustnessReport.read(paths.robustness)
    manifest = read_manifest(paths)
    raw_data = _raw_data(paths)
    has_guidance = checkpoint.metadata_path(paths.guidance).is_file()
    provenance = Provenance(
        training=_training(target, folder),
        registration=_registration(paths, robustness, target.get("git_diff"), folder),
        seed=robustness.seed,
        settings_hash=target["settings_hash"],
        raw_data=raw_data,
        data=PreparedData(
            hash=manifest["hash"],
            source=manifest["source"],
            classes=len(manifest["classes"]),
            images={name: split["images"] for name, split in manifest["splits"].items()},
        ),
        validation=_validation(paths, manifest["hash"]),
        guidance=_trained_model(checkpoint.read_metadata(paths.guidance)) if has_guidance else None,
        target=_trained_model(target),
        evaluation=Evaluation(
            settings_hash=robustness.settings_hash,
            device=robustness.device,
            precision=robustness.precision,
            run_folder=run_folder,
            robustness_sha256=files.sha256(paths.robustness),
            examples_sha256=files.sha256(paths.examples),
        ),
        storage=_storage(paths, raw_data),
        prefect_run=prefect_run,
    )
    (folder / FILE).write_text(json.dumps(provenance.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    return provenance


def _training(metadata: Mapping[str, Any], folder: Path) -> Origin:
    """What the training recorded of itself, in the checkpoint's JSON."""
    if "git_diff" not in metadata:
        return Origin(code=None, environment=None)
    code = Code(
        commit=metadata["git_commit"],
        dirty=metadata["git_dirty"],
        diff=_write_diff(metadata["git_diff"], folder / DIFF),
        diff_redacted=metadata["git_diff_redacted"],
    )
    return Origin(code=code, environment=Environment.model_validate(metadata["environment"]))


def _registration(paths: Paths, robustness: RobustnessReport, training_diff: str | None, folder: Path) -> Origin:
    code = read_source_code(paths)
    # One file where both have the same changes, as nearly always.
    name = DIFF if code.diff == training_diff else REGISTRATION_DIFF
    return Origin(
        code=Code(
            commit=code.commit,
            dirty=code.dirty,
            diff=_write_diff(code.diff, folder / name),
            diff_redacted=code.diff_redacted,
        ),
        environment=current_environment(paths, torch.device(robustness.device), robustness.precision),
    )


def _write_diff(diff: str, path: Path) -> str | None:
    if not diff:
        return None
    path.write_bytes(diff.encode(errors="surrogateescape"))
    return path.name


def _raw_data(paths: Paths) -> RawData | None:
    """What the stage `prepare` read, as `dvc.lock` records it."""
    lock = yaml.safe_load(paths.dvc_lock.read_text(encoding="utf-8")) if paths.dvc_lock.is_file() else {}
    deps = lock.get("stages", {}).get("prepare", {}).get("deps", [])
    raw = [dep for dep in deps if not dep["path"].startswith("tasks/")]
    if not raw:
        return None
    path = raw[0]["path"]
    return RawData(path=path, md5=raw[0].get("md5"), dvc_file=dvc.dvc_file(path, paths))


def _validation(paths: Paths, data_hash: str) -> Validation | None:
    path = paths.validation / "validation.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["data_hash"] != data_hash:
        return None
    expectations = summary["expectations"]
    failed = tuple(f"{each['what']}: {each['observed']}" for each in expectations if not each["ok"])
    return Validation(success=summary["success"], expectations=len(expectations), failed=failed)


def _trained_model(metadata: Mapping[str, Any]) -> TrainedModel:
    return TrainedModel(
        weights_sha256=metadata["weights_sha256"],
        git_commit=metadata.get("git_commit"),
        mlflow_run_id=metadata.get("mlflow_run_id"),
        metrics=metadata.get("metrics", {}),
    )


def _storage(paths: Paths, raw_data: RawData | None) -> Storage:
    storage = remote.default_remote(paths)
    if storage is None:
        return Storage(remote=None, url=None, pushed="unknown")
    raw = [raw_data.dvc_file] if raw_data and raw_data.dvc_file else []
    pushed = remote.is_pushed([*raw, *_FETCHED], paths)
    return Storage(remote=storage.name, url=storage.url, pushed={True: "yes", False: "no", None: "unknown"}[pushed])
