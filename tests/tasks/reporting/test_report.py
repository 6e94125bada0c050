"""The report and the model card: every figure is there, and belongs to the models that it is shown with."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from report_inputs import make_inputs, write
from report_page import Page, make_report
from safetensors.numpy import load_file, save_file

from d2r_core.errors import UserError
from d2r_core.evaluation.self_checks import SELF_CHECKS
from tasks import report
from tasks.reporting import robustness_figures


def test_every_figure_is_on_the_page_and_the_card(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    for model in json.loads(paths.robustness.read_text())["models"].values():
        for attack in model["attacks"].values():
            low, high = (f"{100 * bound:.1f}" for bound in attack["interval"])
            figure, interval = f"{100 * attack['accuracy']:.1f}%", f"{low} to {high}%"
            assert figure + interval in page.text
            assert re.search(rf"\| {attack['name']} \|.* {attack['images']} \|.*{figure} \({interval}\)", card)
        for check in model["checks"]:
            assert check["found"] in page.text
        for share in model["attacks"]["worst"]["per_class"]:
            assert f"{100 * share:.1f}%" in page.text or model["architecture"]["name"] == "resnet18"
        for point in [*model["curves"]["eps"], *model["curves"]["steps"]]:
            assert f"{100 * point['accuracy']:.1f}% " in page.text
    for text in (
        "L∞ 0.1",
        "20 steps of 0.025",
        "best checkpoint: epoch 27",
        "no constant image",
        "train[17]",
        "7a" * 32,
        "71.2%",  # robust after AutoAttack's first attack
        "\N{MULTIPLICATION SIGN} 10",
        "misclassified from eps 0.025",
        "correct at every eps that was tried",
    ):
        assert text in page.text
    assert "expected of more\\_steps | passed" in card


def test_costs_median_and_warnings_are_on_the_page_where_they_are_known(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = json.loads(paths.robustness.read_text())
    robustness["warnings"] = ["The clean accuracy is near chance <10%>."]
    target = robustness["models"]["target"]
    target["costs"] = {"pgd": {"forward_passes": 12345, "backward_passes": 6789, "seconds": 1.234}}
    target["curves"]["median_perturbation"] = {"value": 0.03456, "above": 0.025, "at_most": 0.05}
    write(paths.robustness, robustness)
    report.run(settings, paths)
    page = Page(paths.report)
    assert "The clean accuracy is near chance <10%>." in page.text
    name = target["attacks"]["pgd"]["name"]
    assert f"and seconds on the target: {name} 12,345 + 6,789, 1.23 s." in page.text
    assert "Median minimal perturbation of the target: 0.03456." in page.text


def test_headline_says_what_the_figures_say(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    attacks = json.loads(paths.robustness.read_text())["models"]["target"]["attacks"]
    clean, worst = (f"{100 * attacks[key]['accuracy']:.1f}%" for key in ("clean", "worst"))
    assert f"classifies {clean} of the clean test images correctly, and {worst} under the worst attack" in page.text
    assert f"classifies **{clean}** of the clean test images correctly, and **{worst}**" in card


def test_failed_self_check_is_shown_above_everything(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = json.loads(paths.robustness.read_text())
    robustness["models"]["target"]["checks"][4] |= {"passed": False, "found": "87 of 100 are blind."}
    write(paths.robustness, robustness)
    report.run(settings, paths)
    text = Page(paths.report).text
    assert (
        text.index(f"1 of {len(robustness_figures.CHECKS)} self-checks failed")
        < text.index("87 of 100 are blind.")
        < text.index("Accuracy under")
    )
    assert "do not rely on the figures" in paths.model_card.read_text()


def test_every_self_check_is_explained() -> None:
    """The page is read offline: every check has its explanation there."""
    assert set(robustness_figures.CHECKS) == set(SELF_CHECKS)


def test_one_checkpoint_has_a_report_of_its_own(tmp_path: Path) -> None:
    """Without a chain there is no guidance model, no training, no data validation."""
    settings, paths = make_inputs(tmp_path)
    robustness = json.loads(paths.robustness.read_text())
    del robustness["models"]["guidance"]
    write(paths.robustness, robustness | {"checkpoint": "theirs/model.pt"})
    examples = pd.read_parquet(paths.examples)
    examples[examples["model"] == "target"].to_parquet(paths.examples)
    tensors = load_file(paths.gallery)
    save_file({name: array for name, array in tensors.items() if "guidance" not in name}, paths.gallery)
    paths.report.write_text(report.render(report.read(paths.reports), settings))
    page = Page(paths.report)
    assert page.text.count("theirs/model.pt") >= 2
    assert "The model classifies" in page.text
    assert "uidance " not in page.text
    assert "Validation" not in page.text
    assert len(page.images()) == settings.report.gallery_images * 3


@pytest.mark.parametrize("classes", [2, 20, 21, 200])
def test_confusions_of_few_and_of_many_classes(tmp_path: Path, classes: int) -> None:
    page, _, paths = make_report(tmp_path, classes=[f"class {number}" for number in range(classes)])
    matrix = [tag for tag, attributes in page.tags if "confusion" in (attributes.get("class") or "").split()]
    assert bool(matrix) == (classes <= 20)
    assert "The most frequent confusions" in page.text
    assert paths.report.stat().st_size < 1_000_000


def test_guidance_without_pretraining_is_called_random(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, pretrain_epochs=0)
    assert "with the random weights it starts from" in page.text
    assert "Not pretrained (0 epochs)" in page.text
    assert "not pretrained: random weights" in card
    assert sum(attributes.get("class") == "chart" for _, attributes in page.tags) == 4


def test_absent_autoattack_is_mentioned(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, autoattack_images=0)
    assert page.text.count("AutoAttack") == 1
    assert "AutoAttack was not run." in page.text
    assert "AutoAttack was not run." in card


def test_class_without_test_images_has_no_figure(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path, classes=["full", "empty", "other"], empty_class=1)
    assert "empty0———" in page.text


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    _, _, first = make_report(tmp_path / "one")
    _, _, second = make_report(tmp_path / "two")
    assert first.report.read_bytes() == second.report.read_bytes()
    assert first.model_card.read_bytes() == second.model_card.read_bytes()


@pytest.mark.parametrize("artifact", ["manifest", "train_history", "robustness", "examples", "gallery"])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_missing_or_damaged_artifact_is_named(tmp_path: Path, artifact: str, damage: str) -> None:
    settings, paths = make_inputs(tmp_path)
    path: Path = getattr(paths, artifact)
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*`(dvc repro|d2r stage evaluate)"):
        report.run(settings, paths)
    assert not paths.report.exists()


@pytest.mark.parametrize("change", [("models", "target", "weights_sha256"), ("data", "hash")])
def test_figures_of_something_else_are_refused(tmp_path: Path, change: tuple[str, ...]) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = part = json.loads(paths.robustness.read_text())
    for key in change[:-1]:
        part = part[key]
    part[change[-1]] = "00" * 32
    write(paths.robustness, robustness)
    with pytest.raises(UserError, match=r"was measured on other (weights|data)"):
        report.run(settings, paths)
    assert not paths.report.exists()
    assert not paths.model_card.exists()
