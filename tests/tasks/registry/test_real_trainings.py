"""The gate on models that were really trained: only the better one becomes champion."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import ROOT, settings_from

from tasks import evaluate, prepare, pretrain, report, train, validate
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.registry import gate, moves, versions
from tasks.registry.decision import Decision

pytestmark = pytest.mark.slow


@pytest.fixture
def settings() -> Settings:
    """Digits, adversarial training by PGD with 2 steps."""
    return settings_from(
        yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")),
        prepare={"train_per_class": 60},
        pretrain={"epochs": 0},
        train={"epochs": 4, "steps": 2, "step_size": 0.1, "method": {"name": "at"}},
        evaluate={"steps": 5, "autoattack_images": 0, "check_images": 20},
        promote={"min_clean_accuracy": 0.0, "min_robust_accuracy": 0.0, "onnx": False},
        tracking={"uri": "sqlite:///mlflow.db"},
    )


@pytest.fixture
def paths(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A folder with prepared and accepted digits and a guidance model."""
    monkeypatch.chdir(tmp_path)
    paths = Paths(tmp_path)
    for name in ("params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    paths.dvc_lock.write_text("schema: '2.0'", encoding="utf-8")
    for stage in (prepare, validate, pretrain):
        stage.run(settings, paths)
    return paths


def trained(settings: Settings, paths: Paths, **changes: Any) -> tuple[int, gate.Verdict, Decision]:
    """A registered version that was trained with these changes, and what the gate makes of it."""
    changed = settings.model_copy(update={"train": settings.train.model_copy(update=changes)})
    train.run(changed, paths)
    evaluate.run(changed, paths)
    report.run(changed, paths)
    version = versions.register(changed, paths)
    return version, gate.judge(changed, paths, version), Decision.read(paths.decision)


def test_only_a_better_model_becomes_champion(settings: Settings, paths: Paths) -> None:
    champion, verdict, _ = trained(settings, paths)
    assert verdict.passed
    promote(settings, paths, champion)

    equal, verdict, decision = trained(settings, paths, learning_rate=0.05000001)
    assert not verdict.passed
    assert {rule.name: rule.verdict for rule in decision.rules}["robust_accuracy"] == "failed"
    with pytest.raises(moves.RefusedError):
        promote(settings, paths, equal)

    worse, verdict, _ = trained(settings, paths, epochs=1)
    assert not verdict.passed
    with pytest.raises(moves.RefusedError):
        promote(settings, paths, worse)
    assert versions.champion(settings, paths) == champion

    better, verdict, decision = trained(settings, paths, epochs=20)
    assert verdict.passed, verdict.reasons
    promote(settings, paths, better)
    assert versions.champion(settings, paths) == better


def promote(settings: Settings, paths: Paths, version: int) -> None:
    moves.promote(settings, paths, version, who="tester@host", command="promote", reason="The gate passed it.")
