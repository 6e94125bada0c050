"""A complete robustness.json with made-up figures, for the tests of what reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.evaluation.report_schema import VERSION


def figures(name: str = "PGD-20", accuracy: float = 0.5, images: int = 40, **changes: Any) -> dict[str, Any]:
    """One model under one attack."""
    content = {
        "name": name,
        "norm": "Linf",
        "eps": 0.1,
        "seed": 0,
        "step_size": 0.025,
        "steps": 20,
        "restarts": 1,
        "per_class": [accuracy, accuracy],
    }
    return content | _counts(accuracy, images) | changes


def model(
    weights: str = "weights",
    attacks: Mapping[str, Mapping[str, Any]] | None = None,
    checks: tuple[Mapping[str, Any], ...] = (),
) -> dict[str, Any]:
    """An evaluated model; clean, pgd and worst are added to `attacks` where they are not among them."""
    defaults = {key: figures(key) for key in ("clean", "pgd", "worst")}
    by_attack = {"clean": defaults["clean"], "pgd": defaults["pgd"], **(attacks or {})}
    return {
        "architecture": {"name": "resnet18", "num_classes": 2, "image_size": 8},
        "weights_sha256": weights,
        "attacks": {**by_attack, "worst": by_attack.get("worst", defaults["worst"])},
        "checks": list(checks),
        "curves": {"eps": [{"eps": 0.0, **_counts(0.5, 40)}], "steps": [{"steps": 1, **_counts(0.5, 40)}]},
        "confusion": {"attack": "pgd", "counts": [[10, 10], [10, 10]]},
    }


def content(models: Mapping[str, Mapping[str, Any]] | None = None, *, data: str = "data", **changes: Any) -> Any:
    """The whole file; `changes` replace its other keys."""
    return {
        "version": VERSION,
        "data": {"source": "digits", "hash": data, "classes": ["a", "b"], "test_images": 40},
        "seed": 0,
        "precision": "fp32",
        "device": "cpu",
        "norm": "Linf",
        "models": models or {name: model(name) for name in ("guidance", "target")},
        "settings_hash": "evaluation",
        **changes,
    }


def write(path: Path, whole: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole), encoding="utf-8")


def _counts(accuracy: float, images: int) -> dict[str, Any]:
    interval = [max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1)]
    return {"accuracy": accuracy, "interval": interval, "correct": round(accuracy * images), "images": images}
