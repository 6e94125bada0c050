"""What a reproduction came to: recorded and reproduced figures, weights and environments, side by side."""

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file

from d2r_core import files
from tasks.evaluation.report_schema import AttackFigures, RobustnessReport
from tasks.tracking.environment import Environment, locked_packages

_MAX_PACKAGES = 5  # in one line


class FigureComparison(NamedTuple):
    """The images that a model classifies correctly under one attack; None: that attack did not run."""

    model: str
    attack: str
    recorded: AttackFigures | None
    reproduced: AttackFigures | None

    @property
    def same(self) -> bool:
        return _counts(self.recorded) == _counts(self.reproduced)


class WeightsComparison(NamedTuple):
    """The weights of one model."""

    model: str
    recorded_sha256: str
    reproduced_sha256: str
    difference: str  # how many tensors differ and by how much; empty if none does or the recorded ones are not here

    @property
    def same(self) -> bool:
        return self.recorded_sha256 == self.reproduced_sha256


def figures(recorded: RobustnessReport, reproduced: RobustnessReport) -> tuple[FigureComparison, ...]:
    """Every model under every attack."""
    result = []
    for model in dict.fromkeys([*recorded.models, *reproduced.models]):
        before, after = (
            report.models[model].attacks if model in report.models else {} for report in (recorded, reproduced)
        )
        result += [
            FigureComparison(model, attack, before.get(attack), after.get(attack))
            for attack in dict.fromkeys([*before, *after])
        ]
    return tuple(result)


def weights(model: str, recorded: Path, reproduced: Path) -> WeightsComparison:
    """Two files of weights, tensor by tensor."""
    hashes = (files.sha256(recorded), files.sha256(reproduced))
    return WeightsComparison(model, *hashes, "" if len(set(hashes)) == 1 else _tensors(recorded, reproduced))


def environments(recorded: Environment, here: Environment) -> list[str]:
    """A line for each respect in which they differ."""
    before, after = recorded.model_dump(), here.model_dump()
    return [
        f"{name.replace('_', ' ')}: {before[name]} recorded, {after[name]} here"
        for name in before
        if before[name] != after[name]
    ]


def packages(lock: Path) -> list[str]:
    """A line about the installed packages that are not of the version in requirements.lock; none if all are."""
    different = [
        f"{name} {' or '.join(pins)}, here {here}"
        for name, pins in locked_packages(lock).items()
        if (here := _other(name, pins))
    ]
    if not different:
        return []
    listed = "; ".join(different[:_MAX_PACKAGES])
    more = f" and {len(different) - _MAX_PACKAGES} more" if len(different) > _MAX_PACKAGES else ""
    return [f"packages other than in requirements.lock: {listed}{more}"]


def code(recorded_lock: Path, lock: Path, stages: list[str]) -> list[str]:
    """A line for each code dependency of these stages that is not the one in the recorded `dvc.lock`."""
    before, after = (_code_hashes(path, stages) for path in (recorded_lock, lock))
    return [
        f"code: {path} is not as recorded in dvc.lock for the stage {stage}"
        for (stage, path), md5 in after.items()
        if before.get((stage, path), md5) != md5
    ]


def _counts(figures: AttackFigures | None) -> tuple[object, ...] | None:
    return None if figures is None else (figures.correct, figures.images, figures.per_class)


def _tensors(recorded: Path, reproduced: Path) -> str:
    before, after = load_file(recorded), load_file(reproduced)
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        return "another architecture"
    different = [name for name in before if not torch.equal(before[name], after[name])]
    largest = max(((before[name].double() - after[name].double()).abs().max().item() for name in different), default=0)
    return f"{len(different)} of {len(before)} tensors differ, by up to {largest:.2g}"


def _other(name: str, versions: list[str]) -> str | None:
    """The installed version, if it is another one; a package that is not installed belongs to another platform."""
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    # "+cpu" and the like say where a package was built, not what it is.
    return None if installed.partition("+")[0] in (version.partition("+")[0] for version in versions) else installed


def _code_hashes(lock: Path, stages: list[str]) -> dict[tuple[str, str], str]:
    content: Mapping[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {})
    return {(stage, dep["path"]): dep["md5"] for stage in stages for dep in _code_deps(content.get(stage, {}))}


def _code_deps(stage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (dep for dep in stage.get("deps", []) if dep["path"].startswith(("d2r_core/", "tasks/")))
