"""Makes a version again: code, data, evaluation and on request training, then compares what came out."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from d2r_core import checkpoint, files, runtime
from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation.report_schema import RobustnessReport
from tasks.pipeline import dvc
from tasks.registry import signing, version_files, versions
from tasks.registry.integrity import TAG
from tasks.registry.provenance import Origin, Provenance
from tasks.registry.status import store_exists
from tasks.reproduction import comparison, recorded_data, worktree
from tasks.reproduction.comparison import FigureComparison, WeightsComparison
from tasks.tracking.connection import environment
from tasks.tracking.environment import current_environment

Log = Callable[[str], None]
_PROGRESS = "reproduction.json"
_DATA_STAGES = ("prepare", "validate")


@dataclass(frozen=True)
class Reproduction:
    """What came out."""

    project: Path  # the worktree with everything that was made
    figures: tuple[FigureComparison, ...]
    predictions: tuple[int, int]  # how many of how many answers to an attacked image differ
    weights: tuple[WeightsComparison, ...]  # empty without training
    differences: tuple[str, ...]  # of the environment and the code

    @property
    def same(self) -> bool:
        figures = not self.predictions[0] and all(figure.same for figure in self.figures)
        return figures and all(weights.same for weights in self.weights)


class _Progress(BaseModel):
    """FOLDER/reproduction.json: whose reproduction the folder is, and what has been made again in it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: int
    manifest_sha256: str
    train: bool
    stages: list[str]


def reproduce(settings: Settings, paths: Paths, version: int, folder: Path, *, train: bool, log: Log) -> Reproduction:
    """Evaluate a registered version again, with `train` after training it again, in `folder`; compare the results.

    Everything comes from the verified files of the version, the commit that they name, and the DVC cache and remotes
    of this checkout. Neither the checkout nor its outputs nor the registry are changed: runs go to an MLflow store in
    the folder. After an interruption, the same call continues.

    Raises:
        UserError: there is no such version, its files are not the ones that were registered, it is not signed as
            required, it has no provenance, its code or data cannot be had, a stage failed, or the folder holds
            something else.
    """
    with tempfile.TemporaryDirectory() as temporary:
        entry, progress = _fetch(settings, paths, version, Path(temporary), train)
        provenance = Provenance.read(entry, f"{progress.name} version {version}")
        _check(provenance, entry, progress, train)
        progress = _open(folder, progress)
        shutil.rmtree(folder / "entry", ignore_errors=True)
        shutil.copytree(entry, folder / "entry")
    job = _Job(paths, folder, provenance, progress, log)
    differences: list[str] = []
    if train:
        differences += job.run(provenance.training, ["prepare", "validate"], ["pretrain", "train"])
    differences += job.run(provenance.registration, ["prepare", "pretrain"], ["evaluate"], target=not train)
    return _compare(job.project, folder / "entry", provenance, differences, train)


def _fetch(settings: Settings, paths: Paths, version: int, folder: Path, train: bool) -> tuple[Path, _Progress]:
    """The verified files of the version, in `folder`."""
    name = settings.promote.model_name
    missing = UserError(f"{name} has no version {version}. `d2r models` lists them.")
    if not store_exists(settings, paths):
        raise missing
    with versions.connect(settings, paths) as client:
        registered = versions.find_version(client, name, version)
        if registered is None:
            raise missing
        entry = version_files.read(registered, folder, signing.trusted_key(settings, paths)).folder
        manifest = registered.tags[TAG]
    return entry, _Progress(name=name, version=version, manifest_sha256=manifest, train=train, stages=[])


def _check(provenance: Provenance, entry: Path, progress: _Progress, train: bool) -> None:
    name = f"{progress.name} version {progress.version}"
    if not (entry / "dvc.lock").is_file() or not (entry / "params.yaml").is_file():
        raise UserError(f"{name} was registered without a dvc.lock or params.yaml, so it cannot be made again.")
    if train and provenance.training.code is None:
        raise UserError(f"{name} was trained by a release that did not record the code. Leave out --train.")


def _open(folder: Path, progress: _Progress) -> _Progress:
    """Make the folder, or continue in it."""
    path = folder / _PROGRESS
    if path.is_file():
        try:
            before = _Progress.model_validate_json(path.read_bytes())
        except ValidationError:
            raise UserError(f"{path}: cannot be read. Choose another --folder, or remove this one.") from None
        if before.model_copy(update={"stages": [], "train": progress.train}) != progress:
            raise UserError(
                f"{folder} holds the reproduction of {before.name} version {before.version}, or of an entry of that "
                "number that was deleted since. Choose another --folder, or remove this one."
            )
        if before.train == progress.train:
            return before
        # With training, the figures are those of other weights; the data stay what they are.
        progress = progress.model_copy(update={"stages": [each for each in before.stages if each in _DATA_STAGES]})
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and not a reproduction. Choose another --folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder, progress)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}). Choose another --folder.") from None
    return progress


def _save(folder: Path, progress: _Progress) -> None:
    files.write_text(folder / _PROGRESS, json.dumps(progress.model_dump(), indent=2) + "\n")


class _Job:
    """The stages of one reproduction, run in its worktree."""

    def __init__(self, paths: Paths, folder: Path, provenance: Provenance, progress: _Progress, log: Log) -> None:
        self._paths, self._folder, self._provenance = paths, folder, provenance
        self._progress, self._log = progress, log
        self._fetched: set[str] = set()
        self.project = Paths(folder / "code")

    def run(self, origin: Origin, inputs: list[str], stages: list[str], *, target: bool = False) -> list[str]:
        """Run stages with the code of `origin`, after what they need; returns the differences to then.

        Args:
            inputs: stages whose outs are fetched rather than made.
            target: take the target model from the version's files.
        """
        assert origin.code is not None
        entry = self._folder / "entry"
        self._log(f"code: commit {origin.code.commit[:12]}{f' with {origin.code.diff}' if origin.code.diff else ''}")
        self.project = worktree.restore(self._paths, self._folder / "code", origin.code, entry)
        for name in ("params.yaml", "dvc.lock"):
            shutil.copyfile(entry / name, self.project.root / name)
        differences = self._environment(origin)
        with environment(**self._variables(origin)):
            self._bring(inputs)
            if target:
                for path in (self.project.target, checkpoint.metadata_path(self.project.target)):
                    path.parent.mkdir(exist_ok=True)
                    shutil.copyfile(entry / path.name, path)
            for stage in stages:
                self._run(stage)
        return differences + comparison.code(entry / "dvc.lock", self.project.dvc_lock, stages)

    def _environment(self, origin: Origin) -> list[str]:
        recorded = origin.environment
        if recorded is None:
            return []
        device = runtime.device(settings_file.load(self.project.params).runtime.device)
        here = current_environment(self.project, device, recorded.precision)
        # The stages are started with as many threads as then.
        here = here.model_copy(update={"threads": recorded.threads})
        return comparison.environments(recorded, here) + comparison.packages(self.project.root / "requirements.lock")

    def _variables(self, origin: Origin) -> dict[str, str]:
        """The environment of the stages: a store of their own, and as many threads as then."""
        store = f"sqlite:///{(self._folder / 'mlflow.db').resolve()}"
        threads = str(origin.environment.threads) if origin.environment else None
        return {"MLFLOW_TRACKING_URI": store} | (
            {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if threads else {}
        )

    def _bring(self, inputs: list[str]) -> None:
        """The outs of these stages, from DVC or, for those that prepare the data, by running them."""
        missing = [stage for stage in inputs if stage not in (*self._progress.stages, *self._fetched)]
        message = ""
        if missing:
            self._log(f"from DVC: outs of {', '.join(missing)}")
            message = recorded_data.fetch(self._paths, self.project, missing)
        for stage in missing:
            if recorded_data.is_complete(self.project, stage):
                self._fetched.add(stage)
            elif stage in _DATA_STAGES:
                self._prepare(stage)
            else:
                raise UserError(
                    "The guidance model of the version is in neither DVC's cache nor its remote. Run `dvc push` where "
                    f"it is, or train it again with --train. DVC's message: {message}"
                )
        data_hash = read_manifest(self.project)["hash"]
        if data_hash != self._provenance.data.hash:
            raise UserError(
                f"The data differ: the version's have the hash {self._provenance.data.hash}, and these {data_hash}."
            )

    def _prepare(self, stage: str) -> None:
        """Run a stage that prepares the data, whose outs DVC does not have; of the raw data, it may have them."""
        raw = self._provenance.raw_data
        if stage == "prepare" and raw and raw.dvc_file:
            recorded_data.fetch(self._paths, self.project, [raw.dvc_file])
        try:
            self._run(stage)
        except dvc.BusyError:
            raise
        except UserError as error:
            raise UserError(
                "The data of the version are in neither DVC's cache nor its remote, and cannot be prepared again: "
                f"{error}\nRun `dvc push` where they are."
            ) from None

    def _run(self, stage: str) -> None:
        if stage in self._progress.stages:
            self._log(f"{stage}: made before the interruption")
            return
        self._log(f"{stage}: runs")
        dvc.run_again(stage, self.project, self._log)
        self._progress.stages.append(stage)
        _save(self._folder, self._progress)


def _compare(project: Paths, entry: Path, provenance: Provenance, differences: list[str], train: bool) -> Reproduction:
    weights: list[WeightsComparison] = []
    if train:
        if provenance.guidance:
            hashes = (provenance.guidance.weights_sha256, files.sha256(project.guidance))
            weights.append(WeightsComparison("guidance", *hashes, ""))
        weights.append(comparison.weights("target", entry / project.target.name, project.target))
    return Reproduction(
        project=project.root,
        figures=comparison.figures(
            RobustnessReport.read(entry / project.robustness.name), RobustnessReport.read(project.robustness)
        ),
        predictions=_predictions(entry / project.examples.name, project.examples),
        weights=tuple(weights),
        differences=tuple(dict.fromkeys(differences)),
    )


def _predictions(recorded: Path, reproduced: Path) -> tuple[int, int]:
    keys: list[Any] = ["model", "attack", "index"]
    before, after = (pd.read_parquet(path).set_index(keys)["correct"] for path in (recorded, reproduced))
    before, after = before.align(after)
    return int((before.astype(object) != after.astype(object)).sum()), len(before)
