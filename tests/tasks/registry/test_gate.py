"""The gate: self-checks, floors and the champion decide, on a real sqlite store with real small models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from registry_project import CLASSES, NAME, PASSED, Project, logged_model_folder, logits, make_project

from d2r_core import data
from d2r_core.errors import UserError
from tasks.config.settings import Settings
from tasks.evaluation import evaluate_model
from tasks.registry import versions
from tasks.registry.decision import Decision

pytestmark = pytest.mark.slow

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
    verdict = project.judge(project.register(worst=0.6, autoattack=0.4))
    assert not verdict.passed
    assert verdict.reasons == (
        "Accuracy under AutoAttack standard on 10 images 40.00% is below the floor of 50.00% "
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


def test_a_collapsed_training_is_refused(project: Project) -> None:
    project.train(collapsed=True)
    project.evaluate()
    verdict = project.judge(versions.register(project.settings, project.paths))
    assert verdict.reasons == (
        "In the last epochs of its training, the accuracy on unperturbed validation images was at chance.",
    )


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
    verdict = project.judge(project.register(checks=()))
    assert verdict.reasons == ("No self-checks were recorded with its figures. Evaluate it anew: `d2r run`.",)


def test_champion_is_replaced_by_a_better_model_only(project: Project) -> None:
    first = project.register(seed=0, worst=0.6)
    project.promote(first)
    assert project.champion() == first
    assert project.judge(first).passed

    for seed, worst in ((1, 0.55), (2, 0.6), (3, 0.7)):  # worse, equally good, and better by chance
        verdict = project.judge(project.register(seed=seed, worst=worst))
        assert not verdict.passed
        (reason,) = verdict.reasons
        assert reason.startswith(
            f"Robust accuracy {worst:.2%}, the champion's 60.00% (version 1, recorded) on the same"
        )
        assert "not supported by McNemar's exact test" in reason

    better = project.register(seed=4, worst=0.9)
    verdict = project.judge(better)
    assert verdict.passed
    assert any("The gain is supported by McNemar's exact test: p = 0.016" in reason for reason in verdict.reasons)
    project.promote(better)
    assert project.champion() == better

    assert project.rollback().champion == project.champion() == first
    with pytest.raises(UserError, match="version 1 is the first champion"):
        project.rollback()


def test_the_decision_is_written_and_on_the_version(project: Project) -> None:
    project.promote(project.register(seed=0, worst=0.6, autoattack=0.5))
    version = project.register(seed=1, worst=0.9, autoattack=0.5)
    verdict = project.judge(version)
    decision = Decision.read(project.paths.decision)
    assert decision.model_dump_json() == project.version(version).tags["decision"]
    assert (decision.version, decision.passed, decision.champion) == (version, verdict.passed, 1)
    assert decision.champion_predictions == "recorded"
    rules = {rule.name: rule for rule in decision.rules}
    assert {name: rule.verdict for name, rule in rules.items()} == {
        "min_clean_accuracy": "passed",
        "min_robust_accuracy": "passed",
        "above_chance": "passed",
        "training": "passed",
        "self_checks": "passed",
        "data_validation": "passed",
        "robust_accuracy": "passed",
        "clean_accuracy": "passed",
        "worst_class": "passed",
        "autoattack": "undecided",
    }
    robust = rules["robust_accuracy"]
    assert robust.interval is not None
    assert 0.1 < robust.interval[0] < 0.3 < robust.interval[1]
    assert robust.figures["only_challenger"] == 6
    assert robust.figures["only_champion"] == 0
    project.paths.decision.write_text("{}")
    with pytest.raises(UserError, match=r"decision\.json: cannot be read"):
        Decision.read(project.paths.decision)


def test_a_model_without_robustness_is_refused_whatever_the_floors(project: Project) -> None:
    verdict = project.judge(project.register(clean=0.95, worst=0.0))
    assert not verdict.passed
    (reason,) = verdict.reasons
    assert reason.startswith("Robust accuracy 0.00% of 20 images")
    assert reason.endswith("is not shown to be above chance, 10.00% with 10 classes.")


def test_a_loss_of_clean_accuracy_refuses_a_more_robust_model(project: Project) -> None:
    project.promote(project.register(seed=0, clean=0.95, worst=0.5))
    verdict = project.judge(project.register(seed=1, clean=0.85, worst=0.8))
    assert [reason.partition(",")[0] for reason in verdict.reasons] == ["Clean accuracy 85.00%"]


def test_a_lost_autoattack_refuses_a_model_that_gains_under_the_other_attacks(project: Project) -> None:
    project.promote(project.register(seed=0, worst=0.6, autoattack=0.6))
    verdict = project.judge(project.register(seed=1, worst=0.9, autoattack=0.0))
    assert [reason.partition(" 0.00%")[0] for reason in verdict.reasons] == ["Accuracy under AutoAttack"]


def test_data_that_were_not_accepted_refuse_a_version(project: Project) -> None:
    project.paths.accepted.write_text('{"data_hash": "other"}')
    verdict = project.judge(project.register())
    assert not verdict.passed
    assert "No data validation that accepted its data" in verdict.reasons[0]


def test_an_earlier_version_is_judged_by_its_own_record(project: Project) -> None:
    first = project.register(seed=0, worst=0.6)
    project.prepare(seed=1)
    project.register(seed=1, worst=0.6)
    assert project.judge(first).passed
    # Another evaluation of the same weights goes to the same run.
    project.prepare(seed=0)
    project.with_settings(evaluate={"eps": 0.2})
    project.register(seed=0, worst=0.1)
    assert "Robust accuracy (worst attack, eps 0.1) 60.00% reaches" in "".join(project.judge(first).reasons)


def test_forged_tags_change_no_verdict(project: Project) -> None:
    version = project.register(worst=0.0, checks=(FAILED,))
    for key, value in (("robust_accuracy", "0.99"), ("checks", "passed")):
        mlflow.MlflowClient().set_model_version_tag(NAME, str(version), key, value)
    reasons = project.judge(version).reasons
    assert [reason.split()[0] for reason in reasons] == ["Robust", "Self-check"]
    mlflow.MlflowClient().set_model_version_tag(NAME, str(version), "evaluation_hash", "other")
    with pytest.raises(UserError, match="tags of version 1 name another evaluation than the one in its files"):
        project.judge(version)


def test_forged_tags_of_the_champion_do_not_make_a_refresh(project: Project) -> None:
    """On new data no gain is needed: whether the data are new is read from the champion's files."""
    champion = project.register(worst=0.6)
    project.promote(champion)
    mlflow.MlflowClient().set_model_version_tag(NAME, str(champion), "data_hash", "other")
    project.judge(project.register(seed=1, worst=0.6))
    rules = Decision.read(project.paths.decision).rules
    assert "McNemar" in next(rule.reason for rule in rules if rule.name == "robust_accuracy")


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
    # Of the attacks that the made-up challengers were under.
    common = measured.examples[measured.examples["attack"].isin(["clean", "pgd"])]
    champions = common.groupby("index")["correct"].all().mean()
    assert 0.1 < champions < 0.99

    better = project.register(seed=1, clean=1.0, worst=1.0)
    assert project.judge(better).passed, "no gain is needed on new data"
    assert Decision.read(project.paths.decision).champion_predictions == "attacked again"
    worse = project.register(seed=2, clean=1.0, worst=0.3)
    verdict = project.judge(worse)
    assert verdict.reasons[0].startswith(
        f"Robust accuracy 30.00%, the champion's {champions:.2%} (version 1, attacked again) on the same 20 images"
    )
    assert "Trained on new data, it is not shown to lose less than 15.00%" in verdict.reasons[0]
    # A version of data that do not lie here any more cannot be compared.
    project.prepare(seed=2)
    with pytest.raises(UserError, match="version 3 was measured on other data or with other `evaluate` settings"):
        project.judge(worse)


@pytest.mark.parametrize("other", [{"eps": 0.05}, {"norm": "L2"}, {"precision": "tf32"}])
def test_figures_of_another_evaluation_are_not_compared_as_recorded(project: Project, other: dict[str, Any]) -> None:
    project.promote(project.register(seed=0, worst=0.99))
    project.with_settings(evaluate=other)
    project.judge(project.register(seed=1, worst=0.98))
    decision = Decision.read(project.paths.decision)
    assert decision.champion_predictions == "attacked again"
    assert "McNemar" in next(rule.reason for rule in decision.rules if rule.name == "robust_accuracy")


def test_champion_of_other_classes_is_not_compared(project: Project) -> None:
    project.promote(project.register(seed=0))
    project.train(seed=1, classes=[*CLASSES[:9], "letter a"])
    project.evaluate(worst=0.9)
    verdict = project.judge(versions.register(project.settings, project.paths))
    assert not verdict.passed
    assert verdict.reasons[0].startswith("Its class list is not that of the champion (version 1)")


def test_champion_whose_files_are_gone_or_changed(project: Project) -> None:
    project.promote(project.register(seed=0))
    challenger = project.register(seed=1, worst=0.9)
    files = logged_model_folder(project.version(1)) / "data/model"
    (files / "examples.parquet").unlink()
    verdict = project.judge(challenger)
    assert not verdict.passed
    (reason,) = verdict.reasons
    assert reason.startswith("It cannot be compared with the champion. digits version 1: its files were changed")
    assert "examples.parquet" in reason
    shutil.rmtree(files.parents[1])
    (reason,) = project.judge(challenger).reasons
    assert reason.startswith("It cannot be compared with the champion.")
    assert project.champion() == 1


def test_test_images_that_the_champion_was_trained_on_are_left_out(project: Project) -> None:
    project.promote(project.register(seed=0, clean=1.0, worst=1.0))
    train = data.load_split(project.paths.prepared / "train.safetensors")
    project.prepare(seed=1)
    project.replace_test_images(train.images[:5])
    challenger = project.register(seed=1, clean=1.0, worst=1.0)
    assert project.judge(challenger).passed
    robust = next(rule for rule in Decision.read(project.paths.decision).rules if rule.name == "robust_accuracy")
    assert "(version 1, attacked again, without 5 test images that it was trained on) on the same 15" in robust.reason

    project.replace_test_images(train.images)
    (reason,) = project.judge(project.register(seed=2)).reasons
    assert reason.startswith("The champion was trained on all 20 test images")
