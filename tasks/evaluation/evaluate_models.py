"""A whole evaluation of one model or several on the same images: attacks, curves, self-checks, and images to show."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2r_core import files, runtime
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import under_attack
from d2r_core.attacks.run import adversarial_images
from d2r_core.data import Split, balanced_order, to_float
from d2r_core.evaluation import curves
from d2r_core.evaluation.curves import EpsCurve, StepsCurve
from d2r_core.evaluation.self_checks import SelfCheck, run_self_checks
from d2r_core.interruption import Interrupted
from tasks.config.settings import Evaluate
from tasks.config.stage_code import stage_code
from tasks.evaluation.evaluate_model import ModelFigures, evaluate_model, evaluation_config
from tasks.evaluation.report_schema import VERSION, RobustnessReport

_GALLERY = 32  # images
_CHECK_QUERIES = 1000  # of Square as the self-checks' black box


class LoadedModel(NamedTuple):
    """A model, and what identifies it."""

    model: nn.Module  # on its device
    metadata: Mapping[str, Any]  # architecture, weights_sha256


@dataclass(frozen=True)
class EvaluationSetup:
    """What figures depend on beside the model."""

    test: Split
    source: str  # where the images come from
    classes: list[str]
    data_hash: str
    settings: Evaluate
    seed: int
    cache_root: Path  # of evaluations under way

    def config(self, evaluated: LoadedModel) -> EvaluationConfig:
        """How a model is attacked."""
        device = next(evaluated.model.parameters()).device
        return evaluation_config(
            self.settings, seed=self.seed, device=device, cache_folder=self.cache_folder(evaluated)
        )

    def cache_folder(self, evaluated: LoadedModel) -> Path:
        """The folder of a model's finished batches, named after everything that they depend on."""
        code = files.code_fingerprint(*stage_code("evaluate"))
        device = next(evaluated.model.parameters()).device.type
        versions = [version(package) for package in ("torch", "pyautoattack")]
        settings = self.settings.model_dump(mode="json")
        parts = [evaluated.metadata["weights_sha256"], self.data_hash, settings, self.seed, code, device, versions]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache_root / f"evaluate-{key}"


class EvaluationResult(NamedTuple):
    """What is written of an evaluation."""

    robustness: dict[str, Any]
    examples: pd.DataFrame
    gallery: dict[str, Tensor]

    def accuracies(self) -> dict[str, dict[str, float]]:
        """model -> attack -> accuracy."""
        return {
            name: {key: figure["accuracy"] for key, figure in model["attacks"].items()}
            for name, model in self.robustness["models"].items()
        }

    def write(self, folder: Path) -> None:
        """Write robustness.json, examples.parquet and gallery.safetensors into `folder`."""
        with files.atomic(folder / "examples.parquet") as temporary:
            self.examples.to_parquet(temporary, index=False)
        with files.atomic(folder / "gallery.safetensors") as temporary:
            save_file(self.gallery, temporary)
        report = RobustnessReport.model_validate({"version": VERSION, **self.robustness})
        files.write_text(folder / "robustness.json", report.json_text())


class _CheckImages(NamedTuple):
    """The test images of curves and self-checks."""

    image_ids: Tensor
    split: Split


class _AttackedModel(NamedTuple):
    """What the attacks made of a model; its self-checks come once all models have been attacked."""

    attacks: ModelFigures
    eps_curve: EpsCurve
    steps_curve: StepsCurve


def evaluate_models(models: Mapping[str, LoadedModel], setup: EvaluationSetup) -> EvaluationResult:
    """Every attack, curve and self-check of every model; the one called "target" chooses the images to show.

    Finished batches are cached in `setup.cache_root` until `clear_cache`: the same call continues an interrupted one.
    Under torchrun every process calls it alike, takes its share, and gets the whole.

    Raises:
        Interrupted: by SIGINT or SIGTERM.
    """
    try:
        return _evaluate_models(models, setup)
    except KeyboardInterrupt:
        raise Interrupted(f"finished batches are kept in {setup.cache_root}: run it again to continue.") from None


def clear_cache(models: Mapping[str, LoadedModel], setup: EvaluationSetup) -> None:
    """Remove the models' finished batches."""
    for evaluated in models.values():
        shutil.rmtree(setup.cache_folder(evaluated), ignore_errors=True)


def _evaluate_models(models: Mapping[str, LoadedModel], setup: EvaluationSetup) -> EvaluationResult:
    image_ids = balanced_order(setup.test.labels, setup.seed)[: setup.settings.check_images].sort().values
    check_images = _CheckImages(image_ids, setup.test.take(image_ids))
    runtime.set_precision(setup.settings.precision)
    attacked = {name: _attack(name, evaluated, setup, check_images) for name, evaluated in models.items()}
    gallery = _gallery(models, setup, image_ids, attacked["target"].eps_curve)
    checks = {name: _self_checks(name, models, setup, check_images, attacked[name], gallery) for name in models}
    robustness = {
        "data": {
            "source": setup.source,
            "hash": setup.data_hash,
            "classes": setup.classes,
            "test_images": len(setup.test),
        },
        "seed": setup.seed,
        "precision": setup.settings.precision,
        "device": str(next(models["target"].model.parameters()).device),
        "norm": setup.settings.norm,
        "models": {
            name: _model_figures(models[name], attacked[name], checks[name], len(setup.classes)) for name in models
        },
    }
    examples = [part.attacks.examples.assign(model=name) for name, part in attacked.items()]
    return EvaluationResult(robustness, pd.concat(examples, ignore_index=True), gallery)


def _attack(name: str, evaluated: LoadedModel, setup: EvaluationSetup, check_images: _CheckImages) -> _AttackedModel:
    config, model = setup.config(evaluated), evaluated.model
    figures = evaluate_model(
        model,
        setup.test,
        setup.settings,
        classes=len(setup.classes),
        seed=setup.seed,
        description=name,
        cache_folder=config.cache_folder,
    )
    image_ids, split = check_images
    cached = config.cached_in("curve")
    return _AttackedModel(
        figures,
        curves.against_eps(model, split, cached, image_ids=image_ids),
        curves.against_steps(model, split, cached, image_ids=image_ids),
    )


def _self_checks(
    name: str,
    models: Mapping[str, LoadedModel],
    setup: EvaluationSetup,
    check_images: _CheckImages,
    attacked: _AttackedModel,
    gallery: Mapping[str, Tensor],
) -> list[SelfCheck]:
    from tasks.evaluation import autoattack

    settings, examples = setup.settings, attacked.attacks.examples
    return run_self_checks(
        models[name].model,
        check_images.split,
        setup.config(models[name]).cached_in("checks"),
        eps_curve=attacked.eps_curve,
        steps_curve=attacked.steps_curve,
        distances={
            key: _tensor(examples["distance"][examples["attack"] == key])
            for key in attacked.attacks.figures
            if key != "worst"  # no attack of its own
        },
        saved=(gallery["clean"], gallery[f"{name}_adversarial"]),
        other=next(((other, evaluated.model) for other, evaluated in models.items() if other != name), None),
        black_box_attack=autoattack.Square(
            eps=settings.eps, norm=settings.norm, seed=setup.seed, queries=_CHECK_QUERIES
        ),
        image_ids=check_images.image_ids,
    )


def _model_figures(
    evaluated: LoadedModel, attacked: _AttackedModel, checks: list[SelfCheck], classes: int
) -> dict[str, Any]:
    """A model's part of robustness.json."""
    median = attacked.eps_curve.median_perturbation()
    return {
        "architecture": evaluated.metadata["architecture"],
        "weights_sha256": evaluated.metadata["weights_sha256"],
        "attacks": attacked.attacks.figures,
        "costs": {key: asdict(cost) for key, cost in attacked.attacks.costs.items()},
        "checks": [
            {"key": check.key, "name": check.name, "passed": check.passed, "found": check.detail} for check in checks
        ],
        "curves": {
            "eps": attacked.eps_curve.points,
            "steps": attacked.steps_curve.points,
            "median_perturbation": median and median._asdict(),
        },
        "confusion": {"attack": "pgd", "counts": _confusion(attacked.attacks.examples, classes)},
    }


def _confusion(examples: pd.DataFrame, classes: int) -> list[list[int]]:
    """Rows labels, columns predictions under PGD."""
    rows = examples[examples["attack"] == "pgd"]
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    index = (_tensor(rows[column]) for column in ("label", "prediction"))
    return counts.index_put(tuple(index), torch.ones(len(rows), dtype=torch.int64), accumulate=True).tolist()


def _tensor(column: "pd.Series[Any]") -> Tensor:
    return torch.from_numpy(column.to_numpy(copy=True))


def _gallery(
    models: Mapping[str, LoadedModel], setup: EvaluationSetup, image_ids: Tensor, curve: EpsCurve
) -> dict[str, Tensor]:
    """Test images that the target gets right, those that it misclassifies at the smallest eps first; with each model's
    adversarial image of them under PGD.

    Args:
        image_ids: of the curve's images.
        curve: of the target.
    """
    smallest = curve.smallest_eps
    order = smallest.argsort(stable=True)
    order = order[smallest[order] > 0][:_GALLERY]  # at 0 are those that are wrong as they are
    if not len(order):
        order = torch.arange(min(_GALLERY, len(image_ids)))
    index = image_ids[order]
    chosen = setup.test.take(index)
    tensors = {"index": index, "labels": chosen.labels, "clean": chosen.images, "smallest_eps": smallest[order]}
    for name, evaluated in models.items():
        model, config = evaluated.model, replace(setup.config(evaluated), cache_folder=None)
        x_adv = adversarial_images(model, chosen, config.pgd, config, image_ids=index)
        tensors[f"{name}_adversarial"] = x_adv.contiguous()
        with under_attack(model), torch.no_grad(), runtime.autocast(config.device, config.precision):
            x = to_float(chosen.images).to(config.device)
            tensors[f"{name}_clean_prediction"] = model(x).argmax(1).cpu()
            tensors[f"{name}_adversarial_prediction"] = model(x_adv.to(config.device)).argmax(1).cpu()
    return tensors
