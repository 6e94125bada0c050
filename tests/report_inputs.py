"""Made-up artifacts of a whole chain, consistent in themselves, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from safetensors.numpy import save_file

from d2r_core.evaluation.statistics import wilson
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import VERSION
from tasks.reporting import robustness_figures

ROOT = Path(__file__).parent.parent
DIGITS = [str(digit) for digit in range(10)]
EPS = 0.1
Booleans = npt.NDArray[np.bool_]


def make_inputs(
    root: Path,
    *,
    classes: list[str] = DIGITS,
    pretrain_epochs: int = 10,
    autoattack_images: int = 50,
    empty_class: int | None = None,
    **changes: dict[str, Any],
) -> tuple[Settings, Paths]:
    """All that the report reads, consistent in itself: the figures are counted from made-up predictions per image.

    `empty_class` has no test image; `changes` are laid over the sections of params.yaml.
    """
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, change in changes.items():
        values[section] |= change
    values["pretrain"]["epochs"] = pretrain_epochs
    settings, paths = settings_file.parse(values), Paths(root)
    rng = np.random.default_rng(0)
    count = len(classes)
    labels = np.tile(np.array([label for label in range(count) if label != empty_class]), 12)
    manifest = _manifest(classes, labels)
    write(paths.manifest, manifest)
    write(paths.validation / "validation.json", {"success": True, "expectations": EXPECTATIONS})

    metadata = {name: _metadata(name, count) for name in ("guidance", "target")}
    write(paths.guidance.with_suffix(".json"), metadata["guidance"])
    write(paths.target.with_suffix(".json"), metadata["target"])
    _histories(paths, pretrain_epochs)

    frames, models = [], {}
    for name in ("guidance", "target"):
        correct = _correct(name, len(labels), min(autoattack_images, len(labels)), rng)
        models[name] = _model(name, metadata[name], correct, labels, count)
        frame = _examples(name, correct, labels, count, rng)
        pgd = frame[frame["attack"] == "pgd"]
        counts = np.zeros((count, count), dtype=np.int64)
        np.add.at(counts, (pgd["label"].to_numpy(), pgd["prediction"].to_numpy()), 1)
        models[name]["confusion"] = {"attack": "pgd", "counts": counts.tolist()}
        frames.append(frame)
    examples = pd.concat(frames, ignore_index=True)
    examples.to_parquet(paths.examples)
    _gallery(paths, examples, labels, rng)
    data = {"source": "digits", "hash": manifest["hash"], "classes": classes, "test_images": len(labels)}
    about = {"seed": 0, "precision": "fp32", "device": "cpu", "settings_hash": settings.hash("seed", "evaluate")}
    write(paths.robustness, {"version": VERSION, "data": data, **about, "norm": "Linf", "models": models})
    return settings, paths


ATTACKS = {
    "clean": {"name": "clean", "eps": 0.0, "step_size": 0.0, "steps": 0, "restarts": 0},
    "fgsm": {"name": "FGSM", "eps": EPS, "step_size": EPS, "steps": 1, "restarts": 1},
    "pgd": {"name": "PGD-20", "eps": EPS, "step_size": 0.025, "steps": 20, "restarts": 1},
    "cw": {"name": "CW-20", "eps": EPS, "step_size": 0.025, "steps": 20, "restarts": 1},
}
MORE_ATTACKS = {
    "worst": {"name": "worst of these", "eps": EPS, "step_size": 0.025, "steps": 20, "restarts": 1},
    "autoattack": {
        "name": "AutoAttack standard",
        "eps": EPS,
        **dict.fromkeys(("step_size", "steps", "restarts")),
        "stages": [{"name": "APGD-CE", "accuracy": 0.7123}, {"name": "Square", "accuracy": 0.7012}],
    },
}
EXPECTATIONS = [
    {"what": what, "severity": severity, "observed": observed, "allowed": allowed, "ok": ok, **more}
    for what, severity, observed, allowed, ok, more in (
        ("known labels", "error", "all 1420 pass", "0 to 9", True, {"offenders": [], "more": 0}),
        ("no image twice in a split", "warning", "all 1420 pass", "at most 0", True, {"offenders": [], "more": 0}),
        (
            "no constant image",
            "error",
            "5 of 1420 fail",
            "none",
            False,
            {"offenders": ["train[17] (std 0)", "test[3] (std 0)"], "more": 3},
        ),
    )
]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _manifest(classes: list[str], labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    test = np.bincount(labels, minlength=len(classes)).tolist()
    splits = {"train": [117] * len(classes), "validation": [13] * len(classes), "test": test}
    return {
        "source": "digits",
        "path": None,
        "classes": classes,
        "image_size": 16,
        "channels": 3,
        "splits": {name: {"images": sum(counts), "per_class": counts} for name, counts in splits.items()},
        "hash": "d47a" * 16,
        "converted": {"grey": 1797, "resized": 1797},
    }


def _metadata(name: str, classes: int) -> dict[str, Any]:
    network = {"guidance": {"name": "resnet18", "width": 16, "strides": [1, 1, 2, 2]}}
    network["target"] = {"name": "wide_resnet", "depth": 10, "widen_factor": 1}
    return {
        "architecture": {**network[name], "num_classes": classes, "image_size": 16},
        "collapsed": False,
        "metrics": {"epoch": 27, "clean_accuracy": 0.969, "robust_accuracy": 0.734}
        if name == "target"
        else {"epoch": 9},
        "seed": 0,
        "git_commit": "0123456789abcdef" * 2 + "01234567",
        "git_dirty": name == "target",
        "data_hash": "d47a" * 16,
        "settings_hash": "5e77" * 16,
        "mlflow_run_id": "f0" * 16,
        "weights_sha256": {"guidance": "9d" * 32, "target": "7a" * 32}[name],
    }


def _histories(paths: Paths, pretrain_epochs: int) -> None:
    epoch = np.arange(1, pretrain_epochs + 1)
    pretrain = {
        "epoch": epoch,
        "loss": 2.0 * np.exp(-0.5 * epoch) + 0.02,
        "batch_accuracy": 0.99 - 0.6 * np.exp(-0.6 * epoch),
        "accuracy": 0.985 - 0.75 * np.exp(-0.6 * epoch),
        "learning_rate": 0.1,
        "images_per_second": 900.0,
    }
    pd.DataFrame(pretrain).to_csv(paths.pretrain_history, index=False)
    epoch = np.arange(1, 31)
    wobble = 0.015 * np.sin(2.1 * epoch)
    terms = {"ce": np.exp(-0.2 * epoch) + 0.05, "logit": 2 * np.exp(-0.05 * epoch) + wobble}
    terms |= {"clean": 0.05 * np.exp(-0.1 * epoch), "adv": 1.2 * np.exp(-0.06 * epoch)}
    accuracies = {"clean_accuracy": 0.97 - 0.6 * np.exp(-0.25 * epoch) + wobble / 3}
    accuracies |= {"robust_accuracy": 0.73 - 0.5 * np.exp(-0.12 * epoch) + wobble}
    train = {"epoch": epoch, "loss": sum(terms.values()), **terms, "learning_rate": 0.1, **accuracies}
    pd.DataFrame({**train, "images_per_second": 400.0}).to_csv(paths.train_history, index=False)


def _correct(name: str, images: int, autoattack_images: int, rng: np.random.Generator) -> dict[str, Booleans]:
    """Whether each image is classified correctly, by attack; AutoAttack runs on the first images, if on any."""
    chances = {"guidance": (0.99, 0.3, 0.02, 0.01), "target": (0.97, 0.85, 0.72, 0.7)}[name]
    toughness = rng.random(images)  # what a weak attack misleads on, most strong ones do too
    correct = {
        key: toughness + 0.02 * rng.standard_normal(images) < chance
        for key, chance in zip(ATTACKS, chances, strict=True)
    }
    if autoattack_images:
        worst = np.logical_and.reduce(list(correct.values()))
        correct["autoattack"] = worst[:autoattack_images] & (rng.random(autoattack_images) < 0.95)
    return correct


def _model(
    name: str,
    metadata: dict[str, Any],
    correct: dict[str, Booleans],
    labels: npt.NDArray[np.int64],
    classes: int,
) -> dict[str, Any]:
    worst = np.logical_and.reduce([correct[key] for key in ATTACKS])
    attacks = {key: _figure(key, right, labels[: len(right)], classes) for key, right in correct.items()}
    return {
        "architecture": metadata["architecture"],
        "weights_sha256": metadata["weights_sha256"],
        "attacks": {**attacks, "worst": _figure("worst", worst, labels, classes)},
        "checks": _checks(name),
        "curves": _curves(len(labels), 0.72 if name == "target" else 0.02),
    }


def _examples(
    name: str,
    correct: dict[str, Booleans],
    labels: npt.NDArray[np.int64],
    classes: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    frames = []
    for key, right in correct.items():
        label = labels[: len(right)]
        wrong = (label + 1 + rng.integers(0, classes - 1, len(right))) % classes
        columns = {
            "model": name,
            "attack": key,
            "index": np.arange(len(right)),
            "label": label,
            "prediction": np.where(right, label, wrong),
            "margin": np.where(right, 1.0, -1.0) * rng.random(len(right)),
            "correct": right,
            "distance": {**ATTACKS, **MORE_ATTACKS}[key]["eps"],
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _figure(key: str, right: Booleans, labels: npt.NDArray[np.int64], classes: int) -> dict[str, Any]:
    of_class = [right[labels == label] for label in range(classes)]
    return {
        **{**ATTACKS, **MORE_ATTACKS}[key],
        "norm": "Linf",
        "seed": 0,
        **_counts(int(right.sum()), len(right)),
        "per_class": [float(hits.mean()) if len(hits) else None for hits in of_class],
    }


def _counts(correct: int, images: int) -> dict[str, Any]:
    return {
        "accuracy": correct / images,
        "interval": list(wilson(correct, images)),
        "correct": correct,
        "images": images,
    }


def _checks(model: str) -> list[dict[str, Any]]:
    passed = dict.fromkeys(robustness_figures.CHECKS, True) | ({"transfer": None} if model == "guidance" else {})
    return [
        {"key": key, "name": f"expected of {key}", "passed": result, "found": f"{model}: {key} was tested."}
        for key, result in passed.items()
    ]


def _curves(images: int, robust: float) -> dict[str, Any]:
    shares = {0.0: 0.97, 0.5 * EPS: (0.97 + robust) / 2, EPS: robust, 2 * EPS: robust / 3, 4 * EPS: 0.0}
    return {
        "eps": [{"eps": eps, **_counts(round(share * images), images)} for eps, share in shares.items()],
        "steps": [
            {"steps": steps, **_counts(round((robust + 0.1 / steps) * images), images)} for steps in (1, 5, 20, 100)
        ],
    }


def _gallery(paths: Paths, examples: pd.DataFrame, labels: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
    count = min(32, len(labels))
    clean = rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    tensors: dict[str, npt.NDArray[Any]] = {"index": np.arange(count), "labels": labels[:count], "clean": clean}
    tensors["smallest_eps"] = np.append(np.repeat([0.025, 0.05, EPS], 3), np.full(count - 9, np.inf))
    for model in ("guidance", "target"):
        noise = EPS * np.sign(rng.standard_normal(clean.shape))
        tensors[f"{model}_adversarial"] = (clean / 255 + noise).clip(0, 1).astype(np.float32)
        for kind, attack in (("clean", "clean"), ("adversarial", "pgd")):
            chosen = examples[(examples["model"] == model) & (examples["attack"] == attack)]
            tensors[f"{model}_{kind}_prediction"] = chosen["prediction"].to_numpy()[:count].astype(np.int64)
    save_file(tensors, paths.gallery)
