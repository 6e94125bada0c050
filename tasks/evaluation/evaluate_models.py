"""A whole evaluation of one model or several on the same images: attacks, curves, self-checks, and images to show."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2r_core import files, runtime
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.pgd import under_attack
from d2r_core.data import Split, balanced_order, to_float
from d2r_core.evaluation import curves, self_checks
from d2r_core.evaluation.curves import EpsCurve, StepsCurve
from d2r_core.interruption import Interrupted
from tasks.config.settings import Evaluate
from tasks.config.stage_code import stage_code
from tasks.evaluation.evaluate_model import Measurement, measure
from tasks.evaluation.report_schema import VERSION, RobustnessReport

_GALLERY = 32  # images
_CHECK_QUERIES = 1000  # of Square as the self-checks' black box


class Subject(NamedTuple):
    """A model to be evaluated."""

    model: nn.Module  # on its device
    metadata: Mapping[str, Any]  # architecture, weights_sha256


@dataclass(frozen=True)
class Conditions:
    """What figures stand on."""

    test: Split
    source: str  # where the images come from
    classes: list[str]
    data_hash: str
    settings: Evaluate
    seed: int
    state: Path  # folder of what is kept of an evaluation under way

    def options(self) -> dict[str, Any]:
        """As evaluation.run takes them."""
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "seed": self.seed,
            "norm": settings.norm,
            "precision": settings.precision,
        }

    def kept(self, subject: Subject) -> Path:
        """The folder of a model's finished batches, named after everything that they depend on."""
        code = files.code_fingerprint(*stage_code("evaluate"))
        device = next(subject.model.parameters()).device.type
        versions = [version(package) for package in ("torch", "pyautoattack")]
        settings = self.settings.model_dump(mode="json")
        parts = [subject.metadata["weights_sha256"], self.data_hash, settings, self.seed, code, device, versions]
        return self.state / f"evaluate-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"


class Findings(NamedTuple):
    """What is written of an evaluation."""

    robustness: dict[str, Any]
    examples: pd.DataFrame
    gallery: dict[str, Tensor]

    def accuracies(self) -> dict[str, dict[str, float]]:
        """model -> attack -> accuracy."""
        return {
            name: {key: figure["accuracy"] for key, figure in found["attacks"].items()}
            for name, found in self.robustness["models"].items()
        }

    def write(self, folder: Path) -> None:
        """Write robustness.json, examples.parquet and gallery.safetensors into `folder`."""
        with files.atomic(folder / "examples.parquet") as temporary:
            self.examples.to_parquet(temporary, index=False)
        with files.atomic(folder / "gallery.safetensors") as temporary:
            save_file(self.gallery, temporary)
        report = RobustnessReport.model_validate({"version": VERSION, **self.robustness})
        files.write_text(folder / "robustness.json", report.json_text())


class _Examined(NamedTuple):
    measured: Measurement
    against_eps: EpsCurve
    against_steps: StepsCurve


def examine(subjects: Mapping[str, Subject], conditions: Conditions) -> Findings:
    """Every attack, curve and self-check of every subject; the one called "target" chooses the images to show.

    Finished batches are kept in `conditions.state` until `forget`: the same call continues an interrupted one. Under
    torchrun every process calls it alike, takes its share, and gets the whole.

    Raises:
        Interrupted: by SIGINT or SIGTERM.
    """
    try:
        return _examine(subjects, conditions)
    except KeyboardInterrupt:
        raise Interrupted(f"finished batches are kept in {conditions.state}: run it again to continue.") from None


def forget(subjects: Mapping[str, Subject], conditions: Conditions) -> None:
    """Remove what was kept."""
    for subject in subjects.values():
        shutil.rmtree(conditions.kept(subject), ignore_errors=True)


def _examine(subjects: Mapping[str, Subject], conditions: Conditions) -> Findings:
    settings, test = conditions.settings, conditions.test
    checked = balanced_order(test.labels, conditions.seed)[: settings.check_images].sort().values
    part = test.take(checked)
    runtime.set_precision(settings.precision)
    examined = {name: _attacked(name, subject, conditions, part, checked) for name, subject in subjects.items()}
    gallery = _gallery(subjects, conditions, checked, examined["target"].against_eps)
    models = {
        name: {
            "architecture": subject.metadata["architecture"],
            "weights_sha256": subject.metadata["weights_sha256"],
            "attacks": examined[name].measured.figures,
            "checks": _checks(name, subjects, conditions, part, checked, examined[name], gallery),
            "curves": {"eps": examined[name].against_eps.points, "steps": examined[name].against_steps.points},
            "confusion": {"attack": "pgd", "counts": _confusion(examined[name].measured, len(conditions.classes))},
        }
        for name, subject in subjects.items()
    }
    robustness = {
        "data": {
            "source": conditions.source,
            "hash": conditions.data_hash,
            "classes": conditions.classes,
            "test_images": len(test),
        },
        "seed": conditions.seed,
        "precision": settings.precision,
        "device": str(next(subjects["target"].model.parameters()).device),
        "norm": settings.norm,
        "models": models,
    }
    frames = [found.measured.examples.assign(model=name) for name, found in examined.items()]
    return Findings(robustness, pd.concat(frames, ignore_index=True), gallery)


def _attacked(name: str, subject: Subject, conditions: Conditions, part: Split, checked: Tensor) -> _Examined:
    settings, folder = conditions.settings, conditions.kept(subject)
    measured = measure(
        subject.model,
        conditions.test,
        settings,
        classes=len(conditions.classes),
        seed=conditions.seed,
        description=name,
        folder=folder,
    )
    common: dict[str, Any] = {"eps": settings.eps, "steps": settings.steps, "numbers": checked, **conditions.options()}
    common["folder"] = folder / "curve"
    against_eps = curves.against_eps(
        subject.model, part, step_size=settings.step_size, restarts=settings.restarts, **common
    )
    against_steps = curves.against_steps(subject.model, part, **common)
    return _Examined(measured, against_eps, against_steps)


def _checks(
    name: str,
    subjects: Mapping[str, Subject],
    conditions: Conditions,
    part: Split,
    checked: Tensor,
    examined: _Examined,
    gallery: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """What the self-checks found, as robustness.json has it."""
    from tasks.evaluation import autoattack

    settings = conditions.settings
    examples = examined.measured.examples
    found = self_checks.examine(
        subjects[name].model,
        part,
        eps_curve=examined.against_eps,
        steps_curve=examined.against_steps,
        distances={
            key: _tensor(examples["distance"][examples["attack"] == key])
            for key in examined.measured.figures
            if key != "worst"  # no attack of its own
        },
        saved=(gallery["clean"], gallery[f"{name}_adversarial"]),
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        other=next(((other, subject.model) for other, subject in subjects.items() if other != name), None),
        black_box=autoattack.square(settings.eps, settings.norm, conditions.seed, _CHECK_QUERIES),
        numbers=checked,
        folder=conditions.kept(subjects[name]) / "checks",
        **conditions.options(),
    )
    return [check._asdict() for check in found]


def _confusion(measured: Measurement, classes: int) -> list[list[int]]:
    """Rows labels, columns predictions under PGD."""
    rows = measured.examples[measured.examples["attack"] == "pgd"]
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    index = (_tensor(rows[column]) for column in ("label", "prediction"))
    return counts.index_put(tuple(index), torch.ones(len(rows), dtype=torch.int64), accumulate=True).tolist()


def _tensor(column: "pd.Series[Any]") -> Tensor:
    return torch.from_numpy(column.to_numpy(copy=True))


def _gallery(
    subjects: Mapping[str, Subject], conditions: Conditions, checked: Tensor, curve: EpsCurve
) -> dict[str, Tensor]:
    """Test images that the target gets right, those that fall to the smallest eps first; each model's PGD twins."""
    settings = conditions.settings
    smallest = curve.smallest_eps
    order = smallest.argsort(stable=True)
    order = order[smallest[order] > 0][:_GALLERY]  # at 0 are those that are wrong as they are
    if not len(order):
        order = torch.arange(min(_GALLERY, len(checked)))
    index = checked[order]
    chosen = conditions.test.take(index)
    tensors = {"index": index, "labels": chosen.labels, "clean": chosen.images, "smallest_eps": smallest[order]}
    attack = evaluation.pgd(settings.eps, settings.step_size, settings.steps, settings.norm, settings.restarts)
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": conditions.seed,
        "precision": settings.precision,
    }
    for name, (model, _) in subjects.items():
        device = next(model.parameters()).device
        x_adv = evaluation.perturb(model, chosen, attack, numbers=index, **options)
        tensors[f"{name}_adversarial"] = x_adv.contiguous()
        with under_attack(model), torch.no_grad(), runtime.autocast(device, settings.precision):
            tensors[f"{name}_clean_prediction"] = model(to_float(chosen.images).to(device)).argmax(1).cpu()
            tensors[f"{name}_adversarial_prediction"] = model(x_adv.to(device)).argmax(1).cpu()
    return tensors
