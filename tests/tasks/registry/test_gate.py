"""The gate: self-checks, floors and the champion decide, on a real sqlite store with real small models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from registry_project import CLASSES, NAME, PASSED, Project, logits, make_project

from d2r_core import data
from d2r_core.errors import UserError
from tasks.config.settings import Settings
from tasks.evaluation import evaluate_model
from tasks.registry import versions

FAILED = {"key": "more_steps", "name": "More steps are never weaker", "passed": False, "found": "100 are weaker."}
SKIPPED = {"key": "black_box", "name": "White box beats black box", "passed": None, "found": "No black box."}


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def test_floors_decide_about_the_first_version(project: Project) -> None:
    version = project.register(clean=0.95, worst=0.6)
    verdict = project.judge(version)
    assert verdict.passed
    assert project.version(version).tags["gate"] == "passed"
    assert "Clean accuracy 95.00% reaches the floor of 0.00%" in project.version(version).tags["gate_reasons"]

    project.with_settings(promote={"min_clean_accuracy": 0.96, "min_robust_accuracy": 0.7})
    verdict = project.judge(version)
    assert not verdict.passed
    assert verdict.reasons == (
        "Clean accuracy 95.00% is below the floor of 96.00% (promote.min_clean_accuracy).",
        "Robust accuracy (worst attack, eps 0.1) 60.00% is below the floor of 70.00% (promote.min_robust_accuracy).",
    )
    assert project.version(version).tags["gate"] == "failed"
    assert project.version(version).tags["gate_reasons"] == "\n".join(verdict.reasons)


def test_autoattack_must_reach_the_floor_too(project: Project) -> None:
    project.with_settings(promote={"min_robust_accuracy": 0.5})
    verdict = project.judge(project.register(worst=0.6, autoattack=0.48))
    assert not verdict.passed
    assert verdict.reasons == (
        "Accuracy under AutoAttack standard on 50 images 48.00% is below the floor of 50.00% "
        "(promote.min_robust_accuracy).",
    )


def test_failed_self_checks_refuse_a_version(project: Project) -> None:
    trusted = project.register(seed=0, worst=0.5)
    assert "All self-checks passed." in project.judge(trusted).reasons
    project.promote(trusted)

    masked = project.register(seed=1, worst=0.9, checks=(PASSED, FAILED, SKIPPED))
    assert project.version(masked).tags["checks"] == "more_steps"
    verdict = project.judge(masked)
    assert not verdict.passed
    assert verdict.reasons == (
        "Self-check failed: More steps are never weaker. 100 are weaker. See docs/evaluation.md#more-steps.",
    )
    assert project.version(masked).tags["gate"] == "failed"
    assert project.champion() == trusted


def test_skipped_self_checks_are_mentioned_and_do_not_block(project: Project) -> None:
    version = project.register(checks=(PASSED, SKIPPED))
    assert project.version(version).tags["checks"] == "passed"
    verdict = project.judge(version)
    assert verdict.passed
    assert (
        "Self-check skipped: White box beats black box. No black box. See docs/evaluation.md#black-box."
        in verdict.reasons
    )


def test_version_without_self_checks_is_refused(project: Project) -> None:
    """As one that an older release registered."""
    version = project.register()
    mlflow.MlflowClient().delete_model_version_tag(NAME, str(version), "checks")
    verdict = project.judge(version)
    assert verdict.reasons == ("No self-checks were recorded with its figures. Evaluate it anew: `d2r run`.",)


def test_champion_is_replaced_by_a_better_model_only(project: Project) -> None:
    first = project.register(seed=0, worst=0.6)
    project.promote(first)
    assert project.champion() == first
    assert project.judge(first).passed

    worse = project.register(seed=1, worst=0.55)
    verdict = project.judge(worse)
    assert not verdict.passed
    assert verdict.reasons == (
        "Robust accuracy 55.00% falls behind the champion's 60.00% (version 1, as recorded on the same data; "
        "promote.max_regression is 0.00%).",
    )
    project.with_settings(promote={"max_regression": 0.05})
    assert project.judge(worse).passed
    project.with_settings()

    better = project.register(seed=2, worst=0.65)
    assert project.judge(better).passed
    project.promote(better)
    assert project.champion() == better

    assert project.rollback().champion == project.champion() == first
    with pytest.raises(UserError, match="version 1 is the first champion"):
        project.rollback()


def test_unknown_version_is_neither_gated_nor_promoted(project: Project) -> None:
    project.register()
    with pytest.raises(UserError, match="version=7"):
        project.judge(7)
    with pytest.raises(UserError, match="digits has no version 7"):
        project.promote(7)
    assert project.champion() is None


def test_champion_of_other_data_is_measured_anew(project: Project) -> None:
    model = project.train(seed=0)
    project.evaluate(worst=0.99)
    first = versions.register(project.settings, project.paths)
    project.promote(first)

    # New images, labelled as the champion sees them.
    project.prepare(seed=1)
    test = data.load_split(project.paths.prepared / "test.safetensors")
    seen = torch.from_numpy(logits(model, data.to_float(test.images).numpy()))
    project.prepare(seed=1, labels=seen.argmax(1))
    test = data.load_split(project.paths.prepared / "test.safetensors")
    measured = evaluate_model.evaluate_model(
        model, test, project.settings.evaluate, classes=10, seed=project.settings.seed
    )
    champions = measured.figures["worst"]["accuracy"]
    assert 0.1 < champions < 0.99

    better = project.register(seed=1, worst=champions + 0.01)
    assert project.judge(better).passed
    worse = project.register(seed=2, worst=champions - 0.01)
    verdict = project.judge(worse)
    assert verdict.reasons == (
        f"Robust accuracy {champions - 0.01:.2%} falls behind the champion's {champions:.2%} (version 1, "
        "measured anew on this data; promote.max_regression is 0.00%).",
    )
    # A version of data that do not lie here any more cannot be compared.
    project.prepare(seed=2)
    with pytest.raises(UserError, match="version 3 was measured on other data or with other `evaluate` settings"):
        project.judge(worse)


@pytest.mark.parametrize("other", [{"eps": 0.05}, {"norm": "L2"}, {"precision": "tf32"}])
def test_figures_of_another_evaluation_are_not_compared_as_recorded(project: Project, other: dict[str, Any]) -> None:
    project.promote(project.register(seed=0, worst=0.99))
    project.with_settings(evaluate=other)
    verdict = project.judge(project.register(seed=1, worst=0.98))
    assert verdict.passed
    assert "(version 1, measured anew on this data; " in verdict.reasons[-1]


def test_champion_of_other_classes_is_not_compared(project: Project) -> None:
    project.promote(project.register(seed=0))
    project.train(seed=1, classes=[*CLASSES[:9], "letter a"])
    project.evaluate(worst=0.9)
    verdict = project.judge(versions.register(project.settings, project.paths))
    assert not verdict.passed
    assert verdict.reasons[0].startswith("Its class list is not that of the champion (version 1)")


def test_champion_whose_checkpoint_is_gone(project: Project) -> None:
    project.promote(project.register(seed=0))
    challenger = project.register(seed=1)
    artifacts = mlflow.get_run(str(project.version(1).run_id)).info.artifact_uri
    shutil.rmtree(Path(artifacts.removeprefix("file://")) / "checkpoint")
    with pytest.raises(UserError, match=r"version 1 has no checkpoint/target\.json in its run"):
        project.judge(challenger)
    assert project.champion() == 1
